"""Learning rates, clipping, and updates that a device flag skips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.checks import assert_same_bits
from torch import nn

from softdimo_fast.trainers import OptimizerConfig, ScheduleConfig
from softdimo_fast.trainers.optimization import RoleOptimizer, clip_gradients

GOOD, BAD = torch.tensor(True), torch.tensor(False)


def test_warm_up() -> None:
    schedule = ScheduleConfig(warmup_steps=4)
    assert [schedule.factor(step, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert ScheduleConfig().factor(0, 100) == 1


def test_decays() -> None:
    linear = ScheduleConfig(decay="linear", decay_start=0.5, final=0.2)
    assert [linear.factor(step, 100) for step in (0, 49, 50)] == [1, 1, 1]
    assert linear.factor(75, 100) == pytest.approx(0.6)
    assert linear.factor(99, 100) == pytest.approx(0.2 + 0.8 / 50)
    assert linear.factor(150, 100) == pytest.approx(0.2)
    cosine = ScheduleConfig(decay="cosine")
    assert cosine.factor(0, 100) == 1
    assert cosine.factor(50, 100) == pytest.approx(0.5)
    assert cosine.factor(100, 100) == pytest.approx(0)
    # The decay begins after the warm-up, with which it is multiplied.
    both = ScheduleConfig(warmup_steps=10, decay="cosine")
    assert both.factor(9, 110) == 1
    assert both.factor(10, 110) == 1
    assert both.factor(60, 110) == pytest.approx(0.5)


def module_with_gradients(scale: float = 1.0) -> nn.Module:
    torch.manual_seed(3)
    module = nn.Linear(4, 3)
    for p in module.parameters():
        p.grad = scale * torch.randn_like(p)
    return module


def test_clipping() -> None:
    module = module_with_gradients(10.0)
    before = torch.cat([p.grad.flatten() for p in module.parameters()])  # type: ignore[union-attr]
    norm = clip_gradients(module.parameters(), 1.5)
    torch.testing.assert_close(norm, before.norm())
    after = torch.cat([p.grad.flatten() for p in module.parameters()])  # type: ignore[union-attr]
    torch.testing.assert_close(after, before * 1.5 / before.norm(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(clip_gradients(module.parameters(), None), after.norm())
    torch.testing.assert_close(clip_gradients(module.parameters(), 99.0), after.norm())
    again = torch.cat([p.grad.flatten() for p in module.parameters()])  # type: ignore[union-attr]
    assert_same_bits(again, after)
    assert float(clip_gradients([nn.Parameter(torch.zeros(2))], 1.0)) == 0


CONFIGS = {
    "adamw": OptimizerConfig(weight_decay=0.1, schedule=ScheduleConfig(warmup_steps=2)),
    "sgd": OptimizerConfig(name="sgd", learning_rate=0.1, weight_decay=0.1),
    "momentum": OptimizerConfig(name="sgd", learning_rate=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_optimizer_of_torch(name: str) -> None:
    config, module = CONFIGS[name], module_with_gradients()
    twin = module_with_gradients()
    role = RoleOptimizer(module, config)
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if name == "adamw":
        other: torch.optim.Optimizer = torch.optim.AdamW(twin.parameters(), **options)
    else:
        other = torch.optim.SGD(twin.parameters(), momentum=config.momentum, **options)
    for step in range(3):
        other.param_groups[0]["lr"] = config.learning_rate * config.schedule.factor(step, 10)
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        other.step()
        norm, bad = role.step(step, 10, GOOD)
        assert float(bad) == 0
        assert float(norm) > 0
        for a, b in zip(module.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("bad_steps", [{0}, {1}, {0, 1}])
@pytest.mark.parametrize("cause", ["loss", "nan", "inf"])
def test_a_bad_update_leaves_no_trace(name: str, bad_steps: set[int], cause: str) -> None:
    """Neither in weights nor in the optimizer's state, be it the very first."""
    module, clean = module_with_gradients(), module_with_gradients()
    role, other = RoleOptimizer(module, CONFIGS[name]), RoleOptimizer(clean, CONFIGS[name])
    for step in range(4):
        for target in (module, clean):
            fresh = module_with_gradients(1.0 + step)
            for p, q in zip(target.parameters(), fresh.parameters(), strict=True):
                p.grad = q.grad.clone()  # type: ignore[union-attr]
        if step in bad_steps:
            if cause != "loss":
                module.bias.grad[1] = float(cause)  # type: ignore[index,union-attr]
            before = [p.detach().clone() for p in module.parameters()]
            _, bad = role.step(step, 4, BAD if cause == "loss" else GOOD)
            assert float(bad) == 1
            for old, p in zip(before, module.parameters(), strict=True):
                assert_same_bits(old, p.detach())
        else:
            role.step(step, 4, GOOD)
            other.step(step, 4, GOOD)
    for a, b in zip(module.parameters(), clean.parameters(), strict=True):
        assert_same_bits(a.detach(), b.detach())
        for key, value in other.optimizer.state[b].items():
            assert_same_bits(role.optimizer.state[a][key], value, key)


def test_frozen_parameters_are_left_out() -> None:
    module = module_with_gradients()
    module.bias.requires_grad_(False)  # type: ignore[union-attr]
    role = RoleOptimizer(module, OptimizerConfig())
    assert role.names == ["weight"]
    assert len(role.optimizer.param_groups[0]["params"]) == 1
