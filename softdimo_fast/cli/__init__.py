"""The command line: ``softdimo COMMAND``, one module for each command.

A command is a typed function ``run`` that returns the exit code; its signature and docstring are its help.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses ``arguments`` (default: the process's own), runs one command and returns its exit code."""
    # Here and not above: `import softdimo_fast.cli` must work where only the doctor can run.
    import tyro

    from softdimo_fast.cli import doctor

    commands = {"doctor": doctor.run}
    return tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="softdimo",
        description="Soft-Di[M]O at memory speed.",
        args=list(sys.argv[1:] if arguments is None else arguments),
    )
