"""The ``softdimo`` command.

It stands beside the package, so that ``softdimo doctor`` also runs where importing the package fails.
"""

from __future__ import annotations

import importlib.util
import os
import sys


def main() -> int:
    """Runs the command line and returns its exit code."""
    try:
        return _run()
    except BrokenPipeError:  # whoever reads the output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run() -> int:
    """The whole command line; where the package cannot be imported, the doctor alone."""
    try:
        import tyro  # noqa: F401

        from softdimo_fast import cli
    except (ImportError, OSError) as error:
        if sys.argv[1:2] == ["doctor"]:
            return _doctor_alone(sys.argv[2:])
        print(f"softdimo: {error}\nRun 'softdimo doctor' to see what is missing.", file=sys.stderr)
        return 1
    return cli.main()


def _doctor_alone(arguments: list[str]) -> int:
    """The doctor without the package's ``__init__``, which would raise, and without the argument parser."""
    spec = importlib.util.find_spec("softdimo_fast")
    if spec is None:
        print("softdimo: softdimo_fast is not installed for this Python", file=sys.stderr)
        return 1
    sys.modules.setdefault("softdimo_fast", importlib.util.module_from_spec(spec))
    from softdimo_fast.cli import doctor

    return doctor.run(json="--json" in arguments)


if __name__ == "__main__":
    sys.exit(main())
