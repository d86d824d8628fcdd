"""What a report is made of: pictures, measurements, logs; checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from softdimo_fast.report import _words

Record = Mapping[str, Any]


@dataclass(frozen=True)
class PictureRow:
    """One row of the picture.

    Attributes:
        label: a few words.
        caption: one or two plain sentences: what these images are.
        images: floating ``[N, C, h, w]`` in [-1, 1], C = 1 or 3.
    """

    label: str
    caption: str
    images: Tensor

    @classmethod
    def of(cls, key: str, images: Tensor) -> PictureRow:
        """The row with the label and caption that the digits run has for ``key``.

        Raises:
            KeyError: there are no words for ``key``; the message lists the keys.
        """
        if key not in _words.PICTURE:
            known = ", ".join(_words.PICTURE)
            raise KeyError(f"PictureRow.of: key must be one of {known}, got {key!r}")
        return cls(*_words.PICTURE[key], images)


@dataclass(frozen=True)
class SearchPairs:
    """The same samples before and after test-time embedding optimization.

    Attributes:
        wanted: what was wanted of each sample, shown under its images: N digits or short texts.
        before: floating ``[N, C, h, w]`` in [-1, 1].
        after: the same shape.
    """

    wanted: Sequence[int | str]
    before: Tensor
    after: Tensor

    def __post_init__(self) -> None:
        if self.before.shape != self.after.shape:
            raise ValueError(
                "SearchPairs: before and after must have the same shape, got "
                f"{list(self.before.shape)} and {list(self.after.shape)}"
            )
        if len(self.wanted) != len(self.before):
            raise ValueError(
                f"SearchPairs: wanted must be one for each of the {len(self.before)} samples, got "
                f"{len(self.wanted)}"
            )


@dataclass(frozen=True)
class ReportData:
    """Everything that ``write_report`` shows.

    Attributes:
        title: the page's heading.
        rows: of the picture, from top to bottom; at least one.
        metrics: what ``metrics.json`` holds: "seed", "seconds", "rows" (name -> {"fd", "accuracy",
            "precision", "recall", "coverage", "entropy", "n"}), "search" (name -> {"hit_rate", "fd"}) and
            "bars" (a list of {"name", "value", "bound", "holds"}; a bound is a number, or a text such as
            "<= 0.25"). Rows and numbers may be missing or None, and further keys are left alone.
        pairs: test-time search, before and after; None leaves that part out.
        picture_note: a sentence below the picture, for instance which columns were asked for what.
        logs: for each stage, in order of running, the records of its log: "step" and scalars.
        stage_seconds: for each stage, in order, its wall time.
        versions: of the packages and the machine.
        configs: for each stage the text of its configuration, shown folded.
        command: how the run was started, shown as it is; empty: not shown.
    """

    title: str
    rows: Sequence[PictureRow]
    metrics: Mapping[str, Any]
    pairs: SearchPairs | None = None
    picture_note: str = ""
    logs: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    configs: Mapping[str, str] = field(default_factory=dict)
    command: str = ""

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("ReportData: rows must hold at least one PictureRow, got none")
        missing = [
            name
            for name in ("seed", "seconds", "rows", "search", "bars")
            if name not in self.metrics
        ]
        if missing:
            raise ValueError(
                f"ReportData: metrics must hold {', '.join(missing)}, got only "
                f"{', '.join(map(str, self.metrics)) or 'an empty mapping'}"
            )
        for bar in self.metrics["bars"]:
            absent = [name for name in ("name", "value", "bound", "holds") if name not in bar]
            if absent:
                raise ValueError(
                    f"ReportData: every bar must hold {', '.join(absent)}, got {bar!r}"
                )

    @property
    def seed(self) -> int:
        """Of the run, from ``metrics``."""
        return int(self.metrics["seed"])

    @property
    def seconds(self) -> float:
        """Total wall time, from ``metrics``."""
        return float(self.metrics["seconds"])
