"""Modules and optimizers take back exactly what was saved, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checks import assert_same_bits
from torch import Tensor, nn

from softdimo_fast.trainers import checkpoint
from softdimo_fast.trainers.checkpoint import CheckpointError, load


def test_restore_is_exact_or_does_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wrong = {key: value + 1 for key, value in before.items()}
    wrong["0.bias"] = torch.zeros(3)
    wrong["1.weight"] = wrong["1.weight"].half()
    del wrong["1.bias"]
    wrong["2.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.restore("the student", model.state_dict(), wrong)
    assert str(caught.value).splitlines() == [
        "the student: the saved tensors do not fit:",
        "  1 missing: 1.bias",
        "  1 unexpected: 2.weight",
        "  2 of another shape or dtype: 0.bias: float32 [3], expected float32 [2], "
        "1.weight: float16 [2], expected float32 [2]",
    ]
    for key, value in model.state_dict().items():
        assert_same_bits(value, before[key], key)


def test_restore_lists_at_most_ten() -> None:
    many = {f"k{i:02d}": torch.zeros(1) for i in range(13)}
    with pytest.raises(CheckpointError, match=r"13 missing: k00, .*, k09, and 3 more$"):
        checkpoint.restore("x", many, {})


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3)).to(dtype)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw fused amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True, amsgrad=True),
    "adam capturable": lambda p: torch.optim.Adam(p, lr=1e-2, capturable=False, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(4, 5, generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def trainable(model: nn.Module) -> tuple[list[str], list[Tensor]]:
    pairs = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [name for name, _ in pairs], [p for _, p in pairs]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizers_resume_bit_for_bit(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    straight = make_model(dtype)
    names_, parameters = trainable(straight)
    optimizer = OPTIMIZERS[kind](parameters)
    train(straight, optimizer, range(4))
    tensors = {
        "model": straight.state_dict(),
        "optimizer": checkpoint.optimizer_tensors(optimizer, names_),
    }
    checkpoint.save(tmp_path, 4, tensors=tensors, state={}, config={})
    train(straight, optimizer, range(4, 8))

    resumed = make_model(dtype)
    train(resumed, OPTIMIZERS[kind](trainable(resumed)[1]), range(50, 52))  # anything else
    again = OPTIMIZERS[kind](trainable(resumed)[1])
    train(resumed, again, range(60, 61))  # a state that must go
    loaded = load(tmp_path)
    checkpoint.restore("model", resumed.state_dict(), loaded.group("model"))
    checkpoint.load_optimizer_tensors(again, names_, loaded.group("optimizer"))
    train(resumed, again, range(4, 8))
    for key, value in straight.state_dict().items():
        assert_same_bits(resumed.state_dict()[key], value, key)
    saved = checkpoint.optimizer_tensors(optimizer, names_)
    for key, value in checkpoint.optimizer_tensors(again, names_).items():
        assert_same_bits(value, saved[key], key)


def test_float32_moments_of_bfloat16_parameters_keep_their_bits() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter])
    moments = {key: torch.rand(3) for key in ("p/exp_avg", "p/exp_avg_sq")}
    checkpoint.load_optimizer_tensors(optimizer, ["p"], {**moments, "p/step": torch.tensor(3.0)})
    assert_same_bits(optimizer.state[parameter]["exp_avg"], moments["p/exp_avg"])
    assert optimizer.state[parameter]["exp_avg"] is not moments["p/exp_avg"]


def test_names_are_readable_and_parameters_without_state_are_noted() -> None:
    model = make_model()
    names_, parameters = trainable(model)
    optimizer = torch.optim.AdamW([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 1}])
    assert set(checkpoint.optimizer_tensors(optimizer, names_)) == {
        f"{name}/(no state)" for name in names_
    }
    model[0](torch.randn(2, 5)).sum().backward()  # type: ignore[index]
    optimizer.step()
    saved = checkpoint.optimizer_tensors(optimizer, names_)
    assert {"0.weight/exp_avg", "0.bias/step", "2.weight/(no state)"} < set(saved)
    checkpoint.load_optimizer_tensors(optimizer, names_, saved)
    assert set(optimizer.state) == set(parameters[:2])


def test_optimizer_states_that_do_not_fit() -> None:
    model = make_model()
    names_, parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters)
    train(model, optimizer, range(1))
    saved = checkpoint.optimizer_tensors(optimizer, names_)
    before = {key: value.clone() for key, value in saved.items()}
    wrong = {key: value for key, value in saved.items() if not key.startswith("0.bias/")}
    wrong["0.weight/exp_avg"] = torch.zeros(8, 4)
    wrong["9.weight/exp_avg"] = torch.zeros(8, 4)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_optimizer_tensors(optimizer, names_, wrong)
    assert str(caught.value).splitlines() == [
        "the optimizer: the saved tensors do not fit:",
        "  1 missing: 0.bias",
        "  1 unexpected: 9.weight",
        "  1 of another shape or dtype: 0.weight/exp_avg: [8, 4], for a parameter [8, 5]",
    ]
    for key, value in checkpoint.optimizer_tensors(optimizer, names_).items():
        assert_same_bits(value, before[key], key)


def test_optimizer_names_must_match() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match=r"one for each of 2 parameters, got 1 \(1 different\)"):
        checkpoint.optimizer_tensors(optimizer, ["a"])
    with pytest.raises(ValueError, match=r"got 2 \(1 different\)"):
        checkpoint.load_optimizer_tensors(optimizer, ["a", "a"], {})


def test_optimizer_states_that_are_no_tensors_are_refused() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter])
    optimizer.state[parameter]["count"] = 3
    with pytest.raises(TypeError, match=r"state 'count' of 'p' must be a tensor, got int"):
        checkpoint.optimizer_tensors(optimizer, ["p"])
