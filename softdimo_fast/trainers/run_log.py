"""The numbers of a run: one JSON object per line in ``log.jsonl``, and optional sinks beside it."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, SupportsFloat

Scalar = int | float


class Sink(Protocol):
    """Another place that scalars go to."""

    def write(self, step: int, scalars: Mapping[str, Scalar]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path) -> None:
        # Not `import wandb`: without the package, that takes a folder called wandb, such as it leaves behind.
        from wandb import init  # type: ignore[import-not-found,unused-ignore]

        self._run: Any = init(project="softdimo_fast", dir=str(folder), name=folder.name)

    def write(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


_SINKS: dict[str, Callable[[Path], Sink]] = {"tensorboard": _TensorBoard, "wandb": _Wandb}


class RunLog:
    """Appends to ``folder/log.jsonl``, the record that is always kept; a line is there once written.

    A log that was cut off in the middle of a line is mended. The sinks are a convenience: one that fails is
    dropped with a warning, and the run goes on.
    """

    def __init__(self, folder: str | Path, *, sinks: Sequence[str] = ()) -> None:
        """Opens the log.

        Args:
            folder: of the run; made if missing.
            sinks: any of "tensorboard" and "wandb".

        Raises:
            ValueError: a sink that does not exist.
            ImportError: a sink whose package is missing; the message says how to install it.
            OSError: the folder or the file cannot be written.
        """
        self.folder = Path(folder)
        unknown = [name for name in sinks if name not in _SINKS]
        if unknown:
            raise ValueError(f"sinks must be among {', '.join(_SINKS)}, got {unknown[0]!r}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sinks = {name: _open_sink(name, self.folder) for name in dict.fromkeys(sinks)}
        self._descriptor = self._open()
        self._drop_half_line()

    @property
    def path(self) -> Path:
        return self.folder / "log.jsonl"

    def write(self, step: int, **scalars: SupportsFloat) -> None:
        """Appends one line: the step, and each scalar as a number, or as "nan", "inf" or "-inf".

        Raises:
            OSError: the line could not be written (disk full); no part of it stays.
        """
        values = {name: _scalar(value) for name, value in scalars.items()}
        line = json.dumps({"step": step} | {name: _word(value) for name, value in values.items()})
        self._append(f"{line}\n".encode())
        for name, sink in list(self._sinks.items()):
            self._try(name, lambda sink=sink: sink.write(step, values))  # type: ignore[misc]

    def truncate_after(self, step: int) -> None:
        """Drops the lines later than ``step``, for a run that goes on there; all of them or none."""
        kept = [line for line in _lines(self.path) if json.loads(line)["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                file.write(b"".join(line + b"\n" for line in kept))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = self._open()

    def close(self) -> None:
        """Closes the log and its sinks. Closing again does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        for name, sink in list(self._sinks.items()):
            self._try(name, sink.close)
        self._sinks = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @staticmethod
    def read(folder: str | Path) -> list[dict[str, Any]]:
        """The lines of a run's log, each "step" and its scalars; a half-written last one is left out.

        Raises:
            FileNotFoundError: there is no log.
            ValueError: another line is not what ``write`` writes.
        """
        return [_numbers(json.loads(line)) for line in _lines(Path(folder) / "log.jsonl")]

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def _drop_half_line(self) -> None:
        content = self.path.read_bytes()
        os.ftruncate(self._descriptor, content.rfind(b"\n") + 1)

    def _append(self, line: bytes) -> None:
        end = os.fstat(self._descriptor).st_size
        done = 0
        try:
            while done < len(line):
                done += os.write(self._descriptor, line[done:])
        except OSError as error:
            os.ftruncate(self._descriptor, end)
            raise OSError(error.errno, f"{error.strerror}: the log", str(self.path)) from error

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # a convenience must not end a run, whatever its package raises
            del self._sinks[name]
            message = (
                f"the log sink {name!r} failed and is dropped: {type(error).__name__}: {error}"
            )
            warnings.warn(message, RuntimeWarning, stacklevel=3)


def _open_sink(name: str, folder: Path) -> Sink:
    try:
        return _SINKS[name](folder)
    except ImportError as error:
        raise ImportError(
            f"the log sink {name!r} needs a package that is missing ({error}): "
            f'pip install "softdimo-fast[{name}]"'
        ) from error


def _lines(path: Path) -> Iterable[bytes]:
    """The complete lines; ValueError, with its number, for one that is not ours."""
    *lines, _half = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or type(entry.get("step")) is not int:
            raise ValueError(f"{path}, line {number}: not a JSON object with a step: {line[:80]!r}")
    return lines


def _scalar(value: SupportsFloat) -> Scalar:
    """int as it is; all else, such as a float of numpy or a tensor on the CPU, as float."""
    return value if isinstance(value, int) else float(value)


def _word(value: Scalar) -> Scalar | str:
    """JSON has no NaN and no infinity: "nan", "inf", "-inf"."""
    return value if isinstance(value, int) or math.isfinite(value) else str(value)


def _numbers(entry: Mapping[str, Any]) -> dict[str, Any]:
    words = ("nan", "inf", "-inf")
    return {name: float(v) if v in words else v for name, v in entry.items()}
