"""Checks that every operator passes: same bits, opaque under compile and export, which kernel ran."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """Torch's number of threads inside, and what it was afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def operators_run(call: Callable[[], object]) -> list[str]:
    """The names of our operators that ``call`` really ran, in order."""
    with _Record() as record:
        call()
    return [name for name in record.names if name.startswith("softdimo")]


def gradients(
    fn: Callable[..., Tensor], inputs: Iterable[Tensor], upstream: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The value of ``fn(*inputs)`` and its gradients to every input, from fresh leaves."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    value = fn(*leaves)
    upstream = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    return value.detach(), torch.autograd.grad(value, leaves, upstream)


def assert_same_bits(first: Tensor, second: Tensor, what: str = "value") -> None:
    """Equal shape, dtype and bits; NaN equals NaN."""
    assert first.dtype == second.dtype, what
    assert first.shape == second.shape, what
    same = (first == second) | (first.isnan() & second.isnan())
    assert bool(same.all()), f"{what}: {int((~same).sum())} of {same.numel()} entries differ"


def assert_compiles_bitwise(fn: Callable[..., Tensor], *inputs: Tensor) -> None:
    """``torch.compile(fullgraph=True, dynamic=True)`` gives bitwise the eager value and gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=True)
    value, grads = gradients(fn, inputs, upstream=_fixed_upstream(fn, inputs))
    compiled_value, compiled_grads = gradients(
        compiled, inputs, upstream=_fixed_upstream(fn, inputs)
    )
    assert_same_bits(value, compiled_value)
    for i, (first, second) in enumerate(zip(grads, compiled_grads, strict=True)):
        assert_same_bits(first, second, f"gradient {i}")


def _fixed_upstream(fn: Callable[..., Tensor], inputs: Iterable[Tensor]) -> Tensor:
    with torch.no_grad():
        value = fn(*inputs)
    steps = torch.linspace(-1, 1, max(value.numel(), 1), device=value.device)
    return steps[: value.numel()].reshape(value.shape) + 0.1


def assert_exports(fn: Callable[..., Tensor], *inputs: Tensor) -> None:
    """``torch.export`` captures the call, keeps our operator opaque and gives the same bits."""

    class Module(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return fn(*args)

    program = torch.export.export(Module(), tuple(inputs))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any(name.startswith("softdimo") for name in names), names
    assert_same_bits(program.module()(*inputs), fn(*inputs))
