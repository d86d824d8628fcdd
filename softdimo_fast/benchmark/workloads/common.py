"""What a case is made of: its tensors, the implementations that do the same with them, and the least work."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from softdimo_fast.benchmark.cases import Case
from softdimo_fast.benchmark.shapes import SHAPES
from softdimo_fast.ops import Explanation

Inputs = dict[str, Tensor]
Function = Callable[[Inputs], Any]

# The share of positions that a training step of Di[M]O masks on average.
MASKED = 0.64
TEMPERATURE = 0.9
GUIDANCE = 2.0
LABEL_SMOOTHING = 0.1


@dataclass(frozen=True)
class Implementation:
    """One way to compute the case.

    Attributes:
        name: as tables have it.
        function: from the inputs to the value (a tensor, or a tuple of them).
        same_value: whether its value is the operator's; False for surrogates that share only the gradient.
        random: whether its values are random draws, which cannot be compared one by one.
        compiled: whether its first call compiles.
    """

    name: str
    function: Function
    same_value: bool = True
    random: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class Absent:
    """A comparator that does not run here, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Work:
    """The least that has to be done: bytes read and written, floating-point operations, exponentials."""

    read: int
    written: int
    flops: int
    exponentials: int

    def __add__(self, other: Work) -> Work:
        return Work(
            self.read + other.read,
            self.written + other.written,
            self.flops + other.flops,
            self.exponentials + other.exponentials,
        )


@dataclass
class Workload:
    """A case with tensors.

    Attributes:
        case: what it is.
        inputs: the tensors, by argument name.
        wanted: the inputs whose gradients are computed.
        implementations: ours first.
        absent: comparators that do not run.
        exact: the lean expression, evaluated in float64 to measure errors; None where values are random.
        work: by phase; a phase is missing where its least work has no meaning.
        explanation: of our call.
        accumulators: bytes of float32 sums that half-precision gradients need, counted apart from scratch.
    """

    case: Case
    inputs: Inputs
    wanted: tuple[str, ...]
    implementations: list[Implementation]
    exact: Function | None
    work: dict[str, Work]
    explanation: Explanation
    absent: list[Absent] = field(default_factory=list)
    accumulators: int = 0

    @property
    def autocast(self) -> bool:
        return self.case.dtype == "autocast"

    @property
    def device(self) -> torch.device:
        return next(iter(self.inputs.values())).device

    @contextmanager
    def precision(self) -> Iterator[None]:
        """The context that implementations are called in."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            yield

    def forward(self, implementation: Implementation) -> Any:
        """The value; with or without a graph as the caller has set it."""
        with self.precision():
            return implementation.function(self.inputs)

    def upstream(self, value: Tensor) -> Tensor:
        """The gradient that arrives: fixed normal numbers, or one for a loss."""
        if value.dim() == 0:
            return torch.ones_like(value)
        generator = torch.Generator(self.device).manual_seed(1)
        return torch.randn(
            value.shape, generator=generator, device=self.device, dtype=torch.float32
        ).to(value.dtype)

    def gradients(self, value: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        """Of the wanted inputs."""
        return torch.autograd.grad(value, [self.inputs[name] for name in self.wanted], upstream)


class Maker:
    """Draws the tensors of a case: always the same numbers for the same case."""

    def __init__(self, case: Case, device: str, *, tiny: bool = False) -> None:
        self.case, self.device = case, torch.device(device)
        self.sizes = SHAPES[case.shape].sizes(self.device.type, tiny=tiny)
        self._generator = torch.Generator(self.device).manual_seed(zlib.crc32(case.key.encode()))
        half = torch.bfloat16
        # Under autocast logits come out of a linear layer, in half; tables are parameters, in float32.
        self.activation = torch.float32 if case.dtype == "float32" else half
        self.parameter = half if case.dtype == "bfloat16" else torch.float32

    def normal(self, *shape: int, scale: float = 1.0, parameter: bool = False) -> Tensor:
        """Normal numbers in the dtype of activations, or of parameters."""
        drawn = torch.randn(*shape, generator=self._generator, device=self.device)
        return (scale * drawn).to(self.parameter if parameter else self.activation)

    def tokens(self, *shape: int, vocabulary: int) -> Tensor:
        """Uniform token numbers."""
        return torch.randint(vocabulary, shape, generator=self._generator, device=self.device)

    def mask(self, *shape: int, share: float) -> Tensor:
        """True in exactly ``share`` of the last dimension's entries, at random places."""
        order = torch.rand(*shape, generator=self._generator, device=self.device).argsort(-1)
        return order < round(share * shape[-1])


class ShapeMaker(Maker):
    """Makes tensors of the sizes on any kind of device, on the CPU: one number, without memory for more."""

    def __init__(self, case: Case, kind: str, *, tiny: bool) -> None:
        super().__init__(case, "cpu")
        self.sizes = SHAPES[case.shape].sizes(kind, tiny=tiny)

    def normal(self, *shape: int, scale: float = 1.0, parameter: bool = False) -> Tensor:
        """One number, everywhere."""
        return super().normal(1, scale=scale, parameter=parameter).expand(*shape)


def nbytes(*tensors: Tensor) -> int:
    """Bytes of dense copies of the tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def loss_work(
    explanation: Explanation, inputs: Inputs, wanted: tuple[str, ...], share: float = 1.0
) -> dict[str, Work]:
    """Of a loss over ``share`` of the rows: its gradient can be made in the pass that reads the inputs.

    Therefore "both" reads once, and "backward" alone has no least work of its own.
    """
    read = round(share * explanation.bytes)
    flops, exponentials = round(share * explanation.flops), round(share * explanation.exponentials)
    gradients = nbytes(*(inputs[name] for name in wanted))
    return {
        "forward": Work(read, 0, flops, exponentials),
        # The gradient is two more multiply-adds an entry.
        "both": Work(read, gradients, 2 * flops, exponentials),
    }
