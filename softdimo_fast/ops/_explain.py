"""``explain``: which kernel would run a call, why, and the least work it has to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_EXPLAINERS: dict[Callable[..., Any], Callable[..., Explanation]] = {}


@dataclass(frozen=True)
class Explanation:
    """What one call would do.

    Attributes:
        operator: name of the public function.
        backend: ``"reference"``, ``"cpp"``, ``"cuda"``, ``"triton"`` or, for dense attention, ``"sdpa"``.
        kernel: the code that runs, with its instruction set or architecture.
        reason: why this backend.
        notes: what the call costs beside the kernel (a copy, a fallback), and which promises do not hold.
        bytes: least traffic of the forward pass: every input read once, every output written once.
        flops: floating-point operations of the forward pass, two per multiply-add.
        exponentials: exponentials of the forward pass.
    """

    operator: str
    backend: str
    kernel: str
    reason: str
    notes: tuple[str, ...]
    bytes: int
    flops: int
    exponentials: int

    def floor_seconds(
        self,
        bytes_per_second: float,
        flops_per_second: float,
        exponentials_per_second: float = float("inf"),
    ) -> float:
        """The least time of the forward pass on a machine with these (measured) ceilings, in seconds."""
        return max(
            self.bytes / bytes_per_second,
            self.flops / flops_per_second,
            self.exponentials / exponentials_per_second,
        )

    def __str__(self) -> str:
        lines = [
            f"{self.operator}: {self.kernel} (backend {self.backend!r})",
            f"  why    {self.reason}",
            f"  floor  {_si(self.bytes)}B moved, {_si(self.flops)}FLOP, "
            f"{_si(self.exponentials)}exp (forward)",
        ]
        return "\n".join(lines + [f"  note   {note}" for note in self.notes])


def explain(fn: Callable[..., Any], *args: Any, **options: Any) -> Explanation:
    """Tells which kernel ``fn(*args, **options)`` would run, why, and with what floor; runs nothing.

    Args:
        fn: a public operator of this package, e.g. ``softdimo_fast.soft_embedding``.
        *args, **options: exactly what the call would get; they are checked as the call would check them.

    Returns:
        An :class:`Explanation`; print it for a summary.

    Raises:
        TypeError: ``fn`` is not an operator of this package.
        ValueError, TypeError: whatever the call itself would raise for its arguments.
    """
    if fn not in _EXPLAINERS:
        known = ", ".join(function.__name__ for function in operators())
        raise TypeError(f"explain: fn must be one of {known}, got {fn!r}")
    return _EXPLAINERS[fn](*args, **options)


def explains(
    fn: Callable[..., Any],
) -> Callable[[Callable[..., Explanation]], Callable[..., Explanation]]:
    """Decorator: the decorated function explains calls of ``fn`` (same arguments)."""

    def register(explainer: Callable[..., Explanation]) -> Callable[..., Explanation]:
        _EXPLAINERS[fn] = explainer
        return explainer

    return register


def operators() -> list[Callable[..., Any]]:
    """The public operators, by name."""
    return sorted(_EXPLAINERS, key=lambda fn: fn.__name__)


def _si(value: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} P"
