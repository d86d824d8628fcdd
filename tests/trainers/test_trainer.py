"""The loop: accumulation, averages, the NaN policy, precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checks import assert_same_bits
from support.training import (
    BATCH,
    METHODS,
    generator,
    reward,
    reward_objective,
    snapshot,
    tokenizer,
    trainer,
    transformer,
)
from torch import Tensor

from softdimo_fast.trainers import (
    NonFiniteError,
    OptimizerConfig,
    RewardConfig,
    RewardObjective,
    checkpoint,
)
from softdimo_fast.trainers.run_log import RunLog

SGD = OptimizerConfig(name="sgd", learning_rate=0.05, momentum=0.9)


@pytest.mark.parametrize("name", METHODS)
def test_accumulation_changes_no_result(name: str, tmp_path: Path) -> None:
    """Micro-batches add up to the batch: weights, averages and logged values."""
    states, logs = [], []
    for accumulation in (1, 2, 4):
        folder = tmp_path / str(accumulation)
        run = trainer(name, folder, optimizer=SGD, accumulation=accumulation, steps=4, log_every=4)
        run.run()
        states.append(snapshot(run))
        logs.append(RunLog.read(folder)[0])
    for state, log in zip(states[1:], logs[1:], strict=True):
        for key, value in states[0].items():
            torch.testing.assert_close(state[key], value, atol=1e-5, rtol=1e-4, msg=key)
        for key in log.keys() - {"samples_per_second"}:
            assert log[key] == pytest.approx(logs[0][key], abs=1e-5, rel=1e-3), key


def test_the_batch_size_and_the_seed_are_what_counts() -> None:
    def weights(**options: Any) -> Tensor:
        run = trainer("teacher", steps=2, **options)
        run.run()
        return snapshot(run)["teacher/output.weight"]

    base = weights()
    assert_same_bits(base, weights())
    assert not torch.equal(base, weights(seed=1))
    assert not torch.equal(base, weights(batch_size=4))
    torch.manual_seed(123)
    assert_same_bits(base, weights())


def test_averages_follow_every_step() -> None:
    run = trainer("teacher", steps=3)
    expected = {n: p.detach().clone() for n, p in run.method.roles["teacher"].named_parameters()}
    for step in range(3):
        run.train_step()
        kept = min(0.9, (1 + step) / (10 + step))
        for name, p in run.method.roles["teacher"].named_parameters():
            expected[name] = kept * expected[name] + (1 - kept) * p.detach()
    for name, value in expected.items():
        average = run.averages["teacher"].module.get_parameter(name)
        torch.testing.assert_close(average.detach(), value)


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_forward_passes(name: str) -> None:
    run = trainer(name, steps=5, autocast="bfloat16")
    run.run()
    for key, value in snapshot(run).items():
        assert value.dtype != torch.bfloat16, key
        assert bool(value.isfinite().all()), key


def test_half_precision_stays_near_single() -> None:
    states = []
    for autocast in ("none", "bfloat16"):
        run = trainer("teacher", steps=4, autocast=autocast, optimizer=SGD)
        start = snapshot(run)["teacher/output.weight"]
        run.run()
        states.append(snapshot(run)["teacher/output.weight"] - start)
    assert float((states[0] - states[1]).norm() / states[0].norm()) < 0.1
    assert not torch.equal(*states)


@pytest.mark.parametrize("name", ["tokenizer", "all"])
def test_sgd(name: str) -> None:
    run = trainer(name, optimizer=SGD)
    before = snapshot(run)
    run.run()
    after = snapshot(run)
    assert any(key.endswith("momentum_buffer") for key in after)
    for role in run.method.roles:
        assert any(not torch.equal(before[k], after[k]) for k in after if k.startswith(f"{role}/"))


def test_what_is_logged(tmp_path: Path) -> None:
    run = trainer("all", tmp_path, log_every=5)
    run.run()
    lines = RunLog.read(tmp_path)
    assert [line["step"] for line in lines] == [5, 6]  # the last step is always logged
    for name in ("student", "auxiliary", "heads"):
        assert lines[0][f"{name}/learning_rate"] == 1e-2
        assert lines[0][f"{name}/gradient_norm"] > 0
    for name in ("distillation/divergence", "auxiliary/loss", "adversarial/heads", "reward/value"):
        assert name in lines[0], name
    assert 0 < lines[0]["student/entropy"] < 2.08
    assert 1 / 8 < lines[0]["student/max_probability"] < 1
    assert lines[0]["samples_per_second"] > 0
    assert "skipped_updates" not in lines[0]


# ---- the NaN policy ----------------------------------------------------------------------------------------


class Poisoned:
    """A reward that is not finite in some calls: all of it, its value alone, or its gradient alone."""

    def __init__(self, bad_calls: set[int], what: str) -> None:
        self.reward, self.bad_calls, self.what, self.calls = reward(), bad_calls, what, 0

    def __call__(self, images: Tensor, condition: Tensor) -> Tensor:
        value: Tensor = self.reward(images, condition)
        bad = self.calls in self.bad_calls
        self.calls += 1
        if bad and self.what == "value":
            return value * torch.nan
        if bad and self.what == "value alone":
            return value + torch.nan
        # sqrt has an infinite slope at 0: a finite value, and a gradient of NaN.
        return value + (0 * images.sum((1, 2, 3))).sqrt() if bad else value


def poisoned(bad_calls: set[int], what: str, folder: Path | None = None, **options: Any) -> Any:
    objective = RewardObjective(tokenizer(), Poisoned(bad_calls, what), RewardConfig())
    return trainer(generator(objective), folder, **options)


@pytest.mark.parametrize("what", ["value", "value alone", "gradient"])
def test_raise_names_the_step_and_leaves_the_weights(what: str) -> None:
    run = poisoned({2}, what, log_every=1, seed=77)
    clean = trainer(generator(reward_objective()), steps=2, seed=77)
    clean.run()
    message = r"not finite in 1 updates, the first at step 2 \(seed 77 and that step reproduce it\)"
    with pytest.raises(NonFiniteError, match=message):
        run.run()
    for name, value in snapshot(run).items():
        if "average" not in name:
            assert_same_bits(value, snapshot(clean)[name], name)


def test_raise_waits_for_the_log_and_names_the_first() -> None:
    run = poisoned({1, 3}, "value", log_every=5)
    with pytest.raises(NonFiniteError, match="in 2 updates, the first at step 1 "):
        run.run()
    assert run.step == 5


def test_no_checkpoint_of_a_run_that_the_policy_ends(tmp_path: Path) -> None:
    run = poisoned({3}, "value", tmp_path, log_every=100, checkpoint_every=2)
    with pytest.raises(NonFiniteError, match="the first at step 3 "):
        run.run()
    assert [path.name for path in checkpoint.find(tmp_path / "checkpoints")] == ["step_00000002"]
    again = poisoned(set(), "value", tmp_path, log_every=100, checkpoint_every=2)
    again.run(resume=True)
    assert again.step == 6


@pytest.mark.parametrize("what", ["value", "gradient"])
@pytest.mark.parametrize("bad", [0, 2])
def test_skip_goes_on_and_counts(what: str, bad: int, tmp_path: Path) -> None:
    run = poisoned({bad}, what, tmp_path, nan_policy="skip", nan_limit=1)
    states = []
    run.progress = type(
        "Progress", (), {"update": lambda *_: states.append(snapshot(run)), "close": lambda _: None}
    )()
    start = snapshot(run)
    run.run()
    before = states[bad - 1] if bad else start
    for name, value in states[bad].items():
        if "optimizer" not in name and "average" not in name:
            assert_same_bits(value, before[name], name)
    assert not torch.equal(
        states[-1]["student/output.weight"], states[bad]["student/output.weight"]
    )
    assert [line.get("skipped_updates", 0) for line in RunLog.read(tmp_path)] == (
        [1, 1, 1] if bad == 0 else [0, 1, 1]
    )


def test_skip_has_a_limit() -> None:
    run = poisoned({0, 1, 3}, "value", nan_policy="skip", nan_limit=2)
    with pytest.raises(
        NonFiniteError, match=r"3 updates, the first at step 0 .*'skip' with a limit of 2"
    ):
        run.run()


@pytest.mark.parametrize("what", ["value", "value alone", "gradient"])
@pytest.mark.parametrize("bad", [0, 1])
def test_one_bad_micro_batch_makes_the_whole_update_bad(bad: int, what: str) -> None:
    run = poisoned({bad}, what, accumulation=2, nan_policy="skip", steps=1)
    before = snapshot(run)
    run.run()
    assert_same_bits(before["student/output.weight"], snapshot(run)["student/output.weight"])


def test_only_the_bad_role_is_skipped() -> None:
    """A step whose generator update is bad still trains the auxiliary."""
    run = trainer("distillation", steps=1, nan_policy="skip")
    run.method.student.output.bias.register_hook(lambda g: g * torch.nan)  # type: ignore[attr-defined]
    before = snapshot(run)
    run.run()
    after = snapshot(run)
    assert_same_bits(before["student/output.weight"], after["student/output.weight"])
    assert not torch.equal(before["auxiliary/output.weight"], after["auxiliary/output.weight"])


# ---- devices -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["teacher", "tokenizer", "classifier"])
def test_on_a_cuda_device(name: str) -> None:
    states = []
    for device in ("cpu", "cuda"):
        run = trainer(name, steps=3, optimizer=SGD, device=device)
        run.run()
        states.append(snapshot(run))
    for key, value in states[0].items():
        other = states[1][key].cpu()
        torch.testing.assert_close(other, value, atol=1e-3, rtol=1e-2, msg=key)


def test_configs_are_values() -> None:
    run = trainer("teacher", steps=1)
    assert replace(run.config, steps=2) != run.config
    assert run.config.batch_size == BATCH
    assert transformer().config == transformer().config
