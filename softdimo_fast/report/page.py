"""``report.html``: one page that needs nothing but itself, from a file or from a server."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from softdimo_fast._files import write_atomically
from softdimo_fast.report import _html, _sections
from softdimo_fast.report.contents import PictureRow, ReportData, SearchPairs

__all__ = ["PictureRow", "ReportData", "SearchPairs", "render", "write_report"]

NAME = "report.html"
# What the page may load: nothing from outside. A browser holds it to that.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(folder: Path, data: ReportData) -> Path:
    """Writes ``folder/report.html``; an older one is replaced as a whole or not at all.

    Args:
        folder: of the run; must exist.
        data: what to show.

    Returns:
        The path of the page.

    Raises:
        NotADirectoryError: ``folder`` is not a folder.
        OSError: the page cannot be written; what was there before is as it was.
        TypeError, ValueError: an image is not as ``image_grid`` wants it.
        ImportError: Pillow or matplotlib is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"write_report: folder must be an existing folder, got {folder}")
    path = folder / NAME
    write_atomically(path, render(data).encode("utf-8"))
    return path


def render(data: ReportData) -> str:
    """The page as text; the same data gives the same text."""
    style = (
        resources.files("softdimo_fast.report").joinpath("style.css").read_text(encoding="utf-8")
    )
    parts = [
        _sections.picture(data),
        _sections.words(),
        _sections.results(data),
        _sections.search(data),
        _sections.checks(data),
        _sections.curves(data),
        _sections.timings(data),
        _sections.origins(data),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_html.escape(data.title)}</title>\n"
        f'<link rel="icon" href="data:,">\n<style>\n{style}</style>\n</head>\n<body>\n'
        f"{_sections.header(data)}\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n"
        "</body>\n</html>\n"
    )
