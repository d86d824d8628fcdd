"""A config of every kind of field, and any such config for hypothesis."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal

from hypothesis import strategies as st

from softdimo_fast import _config


class Precision(Enum):
    """An enum whose values are text."""

    FULL = "fp32"
    HALF = "bf16"


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW.

    Attributes:
        lr: learning rate after the warm-up.
        betas: decay rates of the moments,
            first and second.
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require_range(self, "lr", self.lr, above=0, maximum=1)


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Plain descent, told from AdamW by its kind.

    Attributes:
        kind: the tag.
        lr: learning rate.
    """

    kind: Literal["sgd"] = "sgd"
    lr: float = 0.1


@dataclass(frozen=True, kw_only=True)
class GAN:
    """A part that may be absent.

    Attributes:
        weight: of the loss.
        layers: whose features the heads read.
    """

    weight: float
    layers: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """The loop.

    Attributes:
        steps: of the optimizer.
        optimizer: how the weights move.
        profile: of the average.
        save: whether checkpoints are written.
    """

    steps: int = 600
    optimizer: Optimizer | SGD = field(default_factory=Optimizer)
    profile: Literal["constant", "power"] = "constant"
    save: bool = True


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything.

    Attributes:
        name: of the run.
        trainer: the loop.
        gan: the adversarial part.
        out: where results go.
        limit: seconds, or text.
        precision: of the weights.
        notes: free text.
    """

    name: str
    trainer: Trainer = field(default_factory=Trainer)
    gan: GAN | None = None
    out: Path = Path("runs")
    limit: int | float | Literal["auto"] | None = "auto"
    precision: Precision = Precision.FULL
    notes: tuple[str, ...] = ()


RUN = Run(name="digits", gan=GAN(weight=0.5, layers=(1, 3)), notes=("a, b", '"', ""))

finite = st.floats(allow_nan=False, allow_infinity=False)
optimizers = st.builds(
    Optimizer, lr=st.floats(1e-12, 1), betas=st.tuples(finite, finite)
) | st.builds(SGD, lr=finite)
runs = st.builds(
    Run,
    name=st.text(),
    trainer=st.builds(
        Trainer,
        steps=st.integers(),
        optimizer=optimizers,
        profile=st.sampled_from(["constant", "power"]),
        save=st.booleans(),
    ),
    gan=st.none()
    | st.builds(GAN, weight=finite, layers=st.lists(st.integers(), max_size=3).map(tuple)),
    out=st.sampled_from([Path("a b"), Path("/tmp/x"), Path("none"), Path("1")]),
    limit=st.integers() | finite | st.just("auto") | st.none(),
    precision=st.sampled_from(Precision),
    notes=st.lists(st.text(), max_size=3).map(tuple),
)
