"""The command line: ``softdimo COMMAND``, one module for each command.

A command is a typed function ``run`` that returns the exit code; its signature and docstring are its help.
What a user can mend (a wrong value, a missing file, a full disk) ends in one message and exit code 2; a run
that was stopped and saved itself in 75; a finished run that failed its own bars in 1.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

WRONG_INPUT, STOPPED, INTERRUPTED = 2, 75, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses ``arguments`` (default: the process's own), runs one command and returns its exit code."""
    # Here and not above: `import softdimo_fast.cli` must work where only the doctor can run.
    import tyro

    from softdimo_fast.cli import (
        bench,
        config,
        demo,
        doctor,
        export,
        pretokenize,
        sample,
        train,
        tteo,
    )

    commands: dict[str, Any] = {
        "demo": demo.run,
        "train": train.run,
        "sample": sample.run,
        "tteo": tteo.run,
        "config": config.run,
        "export": export.run,
        "pretokenize": pretokenize.run,
        "bench": bench.run,
        "doctor": doctor.run,
    }
    try:
        with _plain_warnings():
            return int(
                tyro.extras.subcommand_cli_from_dict(
                    commands,
                    prog="softdimo",
                    description="Soft-Di[M]O: one-step image generators from masked diffusion teachers.",
                    args=list(sys.argv[1:] if arguments is None else arguments),
                    config=(tyro.conf.FlagCreatePairsOff,),
                )
            )
    except BrokenPipeError:
        raise  # whoever reads the output has seen enough: `softdimo_command` knows what to do
    except KeyboardInterrupt:
        print("softdimo: interrupted; what was saved is kept", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        print(f"softdimo: {error}", file=sys.stderr)
        return code


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """This package's warnings are for the user, who has no use for the line of code that gave them."""
    show = warnings.showwarning

    def plain(message: Any, category: type[Warning], *where: Any, **options: Any) -> None:
        if category.__module__.startswith("softdimo_fast"):
            print(f"softdimo: warning: {message}", file=sys.stderr)
        else:
            show(message, category, *where, **options)

    warnings.showwarning = plain
    try:
        yield
    finally:
        warnings.showwarning = show


def _exit_code(error: Exception) -> int | None:
    """The exit code of an error that its message explains; None for a defect, which shows its traceback."""
    from softdimo_fast._config import ConfigError
    from softdimo_fast.cli.errors import UsageError
    from softdimo_fast.models import ModelFileError
    from softdimo_fast.recipes.stages import StageMismatchError
    from softdimo_fast.recipes.workers import WorkerError
    from softdimo_fast.trainers import CheckpointError, NonFiniteError, Stopped

    if isinstance(error, Stopped):
        return STOPPED
    told = (
        UsageError, ConfigError, CheckpointError, ModelFileError, NonFiniteError,
        StageMismatchError, WorkerError, OSError, ImportError,
    )  # fmt: skip
    return WRONG_INPUT if isinstance(error, told) else None
