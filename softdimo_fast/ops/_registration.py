"""Registers operators with torch: opaque forward and backward, fake kernels, autograd, double backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

REFERENCE = "softdimo_reference"
KERNELS = "softdimo"
TRITON = "softdimo_triton"

# Types of arguments in which no tensor subclass hides.
_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None), bool, int, float, list})


def reference_operator(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Tensor | tuple[Tensor, ...]] | None = None,
    differentiable: Sequence[str] = (),
) -> None:
    """Registers ``softdimo_reference::name`` (and ``name_backward``) from plain-torch functions.

    They are opaque to torch.compile, so a compiled call gives bitwise the eager result.

    Args:
        forward: plain torch, typed; one tensor result when it is differentiable.
        backward: called as ``backward(grad, *forward_arguments, wanted)`` and returns one gradient (or an
            empty tensor) for each name in ``differentiable``; a single one as a bare tensor.
        differentiable: the arguments of ``forward`` that get a gradient, in the order of the results of
            ``backward``.
    """
    operator = opaque(name, name, forward)
    if backward is None:
        return
    backward_operator = opaque(f"{name}_backward", name, backward)
    arguments = list(forward.__code__.co_varnames[: forward.__code__.co_argcount])
    positions = [arguments.index(argument) for argument in differentiable]

    def gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(arguments)
        inputs = restore_inputs(ctx)
        wanted = [bool(ctx.needs_input_grad[position]) for position in positions]
        results = _as_tuple(backward_operator(grad, *inputs, wanted))
        return place(results, positions, wanted, len(inputs))

    operator.register_autograd(gradients, setup_context=save_inputs)
    register_double_backward(f"{REFERENCE}::{name}_backward", backward)


def differentiable(
    name: str,
    gradients: Callable[..., Any],
    setup_context: Callable[..., None],
) -> Callable[..., Any]:
    """Registers the autograd rule of an operator, and returns the operator for calls in eager.

    The rule that torch makes of ``gradients`` crosses the dispatcher again in Python, forward and backward:
    45 us, more than many a kernel takes. What is returned applies the same rule at once, and leaves the call
    to torch's where somebody may be looking at it: compilation, functorch, tensor subclasses.

    Args:
        gradients, setup_context: as for ``torch.library.register_autograd``.
    """
    torch.library.register_autograd(name, gradients, setup_context=setup_context)
    library, _, operator_name = name.partition("::")
    operator = getattr(getattr(torch.ops, library), operator_name).default

    def forward(ctx: Any, *args: Any) -> Any:
        result = below_autograd(*args)
        setup_context(ctx, args, result)
        return result

    def below_autograd(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    members = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    rule: Any = type(operator_name, (torch.autograd.Function,), members)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return operator(*args)
        if not _PLAIN.issuperset(map(type, args)):
            return operator(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return rule.apply(*args)
        return below_autograd(*args)

    return call


def register_double_backward(
    name: str, formula: Callable[..., Tensor | tuple[Tensor, ...]]
) -> Callable[..., Any]:
    """Makes a backward operator differentiable (in eager) through ``formula``, its plain-torch equal.

    ``formula`` takes the operator's own arguments. Returns the operator for calls in eager.
    """

    def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = restore_inputs(ctx)
        sources = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        third_derivative = torch.is_grad_enabled()
        with torch.enable_grad():
            # Fresh aliases: where one input depends on another (the upstream gradient depends on the
            # logits), differentiating by the inputs themselves would count that path here and again
            # outside. For a third derivative the aliases stay linked to the outer graph.
            arguments = list(inputs)
            for i in sources:
                alias = inputs[i].view_as(inputs[i])
                arguments[i] = alias if third_derivative else alias.detach().requires_grad_()
            results = _as_tuple(formula(*arguments))
            pairs = [
                (result, grad)
                for result, grad in zip(results, grads, strict=True)
                if grad is not None and result.requires_grad
            ]
            if not pairs:
                return (None,) * len(inputs)
            outs, upstream = zip(*pairs, strict=True)
            found = torch.autograd.grad(
                outs,
                [arguments[i] for i in sources],
                upstream,
                allow_unused=True,
                create_graph=third_derivative,
            )
        placed: list[Tensor | None] = [None] * len(inputs)
        for i, value in zip(sources, found, strict=True):
            placed[i] = value
        return tuple(placed)

    return differentiable(name, gradients, save_inputs)


def triton_operator(
    name: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    fake_backward: Callable[..., Any],
    *,
    save: Callable[..., None],
    gradients: Callable[..., Any],
    formula: Callable[..., Any],
) -> None:
    """Registers ``softdimo_triton::name`` and ``name_backward`` from functions that launch Triton kernels.

    Opaque, as every operator here: a compiled call launches what the eager call launches, and so gives its
    bits; torch's own compilation of a Triton kernel may choose other ones.

    Args:
        save, gradients: the autograd rule, as :func:`torch.library.register_autograd` takes it.
        formula: plain torch equal to ``backward``, which double backward differentiates.
    """
    for suffix, fn, its_fake in (("", forward, fake), ("_backward", backward, fake_backward)):
        operator = torch.library.custom_op(
            f"{TRITON}::{name}{suffix}",
            fn,
            mutates_args=(),
            schema=torch.library.infer_schema(fn, mutates_args=()),
        )
        operator.register_fake(its_fake)
        torch.library.register_vmap(operator, vmap_refusal(name))
    torch.library.register_autograd(f"{TRITON}::{name}", gradients, setup_context=save)
    register_double_backward(f"{TRITON}::{name}_backward", formula)


def without_autocast(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` with autocast off inside: a specification computes in the dtype it says."""

    @functools.wraps(fn)
    def run(first: Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return fn(first, *rest)

    return run


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Saves every input: tensors through autograd (version-checked), the rest as they are."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*[value for value in inputs if isinstance(value, Tensor)])
    ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]


def restore_inputs(ctx: Any) -> list[Any]:
    """What :func:`save_inputs` saved, in order."""
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if other is None else other[0] for other in ctx.others]


def _as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The results of an operator; torch hands a single one over bare."""
    return (results,) if isinstance(results, Tensor) else results


def place(
    results: Sequence[Tensor], positions: Sequence[int], wanted: Sequence[bool], count: int
) -> tuple[Tensor | None, ...]:
    """Spreads gradients over ``count`` argument slots, None where none is wanted."""
    slots: list[Tensor | None] = [None] * count
    for result, position, needed in zip(results, positions, wanted, strict=True):
        if needed:
            slots[position] = result
    return tuple(slots)


def opaque(
    name: str, public: str, fn: Callable[..., Any], fake: Callable[..., Any] | None = None
) -> Any:
    """``softdimo_reference::name`` from a typed plain-torch function, which is its own fake kernel too.

    ``fake`` takes over where tracing ``fn`` would unroll a loop.
    """
    operator = torch.library.custom_op(
        f"{REFERENCE}::{name}",
        without_autocast(fn),
        mutates_args=(),
        schema=torch.library.infer_schema(fn, mutates_args=()),
    )
    operator.register_fake(fake or fn)
    torch.library.register_vmap(operator, vmap_refusal(public))
    return operator


def vmap_refusal(name: str) -> Callable[..., Any]:
    """A vmap rule that says what to do instead of looping silently."""

    def refuse(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"softdimo_fast.{name} does not support torch.vmap: it takes any leading shape, so pass the "
            "batch as leading dimensions instead"
        )

    return refuse
