"""Operators in eager, called past torch's generated autograd rule: same results, and nothing unseen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.checks import assert_same_bits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from softdimo_fast import masked_cross_entropy, soft_embedding, token_divergence

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

CODEBOOK = torch.randn(7, 4)
TARGETS = torch.tensor([0, 3, 6])
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "soft_embedding": lambda z: soft_embedding(z, CODEBOOK).square().sum(),
    "token_divergence": lambda z: token_divergence(z.detach().flip(0), z),
    "masked_cross_entropy": lambda z: masked_cross_entropy(z, TARGETS, None),
}


class Named(Tensor):
    """A subclass that has torch do everything."""


class Seen(TorchDispatchMode):
    """The names of the operators that were run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(3, 7, generator=torch.Generator().manual_seed(0))


def gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    leaf = logits.detach().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf), leaf)
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_subclasses_and_checkpoints_get_the_same_gradient(name: str, logits: Tensor) -> None:
    loss = LOSSES[name]
    expected = gradient(loss, logits)
    named = logits.as_subclass(Named)
    assert_same_bits(gradient(loss, named).as_subclass(Tensor), expected)
    leaf = logits.clone().requires_grad_()
    checkpoint(loss, leaf, use_reentrant=False).backward()
    assert leaf.grad is not None
    assert_same_bits(leaf.grad, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_dispatch_modes_see_forward_and_backward(name: str, logits: Tensor) -> None:
    with Seen() as seen:
        gradient(LOSSES[name], logits)
    for operator in (f"softdimo::{name}", f"softdimo::{name}_backward"):
        assert seen.names.count(operator) == 1


def test_without_gradients_nothing_is_recorded(logits: Tensor) -> None:
    leaf = logits.requires_grad_()
    with torch.no_grad():
        assert soft_embedding(leaf, CODEBOOK).grad_fn is None
    with torch.inference_mode():
        assert soft_embedding(leaf, CODEBOOK).is_inference()
    assert soft_embedding(leaf.detach(), CODEBOOK).grad_fn is None
    assert soft_embedding(leaf, CODEBOOK).grad_fn is not None
