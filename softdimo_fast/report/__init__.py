"""What a finished run shows: the contact sheet ``grid.png`` and the page ``report.html``.

``grid`` draws images (Pillow), ``curves`` draws logs (matplotlib), ``page`` writes the page from the
``ReportData`` of ``contents``. Both packages are imported by the functions that draw; importing this package
needs neither.
"""
