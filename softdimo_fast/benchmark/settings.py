"""What a benchmark run was asked for, checked and kept in its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from softdimo_fast._files import write_atomically
from softdimo_fast.benchmark import cases
from softdimo_fast.benchmark.errors import BenchmarkError

MARK = "settings.json"
# torch's own allocator as it is, and with the variable that makes it ask for huge pages.
DEFAULT, HUGE_PAGES = "default", "thp"
HUGE_PAGES_VARIABLE = "THP_MEM_ALLOC_ENABLE"


@dataclass(frozen=True)
class Settings:
    """A run.

    Attributes:
        quick: the small selection, with short budgets.
        device: "cpu" or "cuda".
        threads: of the CPU.
        operators, shapes, dtypes, phases: filters; an empty one lets all pass.
        tiny: small sizes and budgets, for tests: its numbers mean nothing.
    """

    quick: bool = False
    device: str = "cpu"
    threads: int = 1
    operators: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    phases: tuple[str, ...] = ()
    tiny: bool = False

    def check(self) -> None:
        """Raises BenchmarkError naming the option that cannot be."""
        if self.device not in ("cpu", "cuda"):
            raise BenchmarkError(f"--device must be cpu or cuda, got {self.device!r}")
        if self.threads < 1:
            raise BenchmarkError(f"--threads must be at least 1, got {self.threads}")
        for phase in self.phases:
            if phase not in cases.PHASES:
                raise BenchmarkError(
                    f"--phase must be among {', '.join(cases.PHASES)}, got {phase!r}"
                )
        if not self.selected():
            raise BenchmarkError(
                "--phase leaves nothing: the operators of this selection have no gradient"
            )

    def selected(self) -> list[cases.Case]:
        """The cases, each with at least one pass."""
        found = cases.select(
            device=self.device,
            quick=self.quick,
            operators=self.operators,
            shapes=self.shapes,
            dtypes=self.dtypes,
        )
        return [case for case in found if cases.select_passes(case, self.phases)]

    @property
    def allocators(self) -> tuple[str, ...]:
        """Each has a process of its own. Pages of the host are no matter of a GPU's tensors."""
        return (DEFAULT,) if self.device == "cuda" else (DEFAULT, HUGE_PAGES)

    def command(self) -> str:
        """The options that give these settings."""
        words = ["softdimo bench", *(["--quick"] if self.quick else [])]
        words += [f"--device {self.device}"] if self.device != "cpu" else []
        words.append(f"--threads {self.threads}")
        for option, given in (
            ("--operator", self.operators),
            ("--shape", self.shapes),
            ("--dtype", self.dtypes),
            ("--phase", self.phases),
        ):
            words += [" ".join((option, *given))] if given else []
        return " ".join(words)


def save(folder: Path, settings: Settings) -> None:
    """Marks a folder as that of a run."""
    write_atomically(folder / MARK, (json.dumps(asdict(settings), indent=1) + "\n").encode())


def load(folder: Path) -> Settings:
    """The settings of the run in a folder.

    Raises:
        BenchmarkError: there is none, or it is of another version.
    """
    path = folder / MARK
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        names = {field.name for field in fields(Settings)}
        if not isinstance(stored, dict) or set(stored) != names:
            raise ValueError(f"it must hold {', '.join(sorted(names))}")
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path} cannot be read: {error}") from error
    return Settings(**{name: _frozen(value) for name, value in stored.items()})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
