"""Test-time embedding optimisation: never worse than its start, sample by sample; no weight changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.checks import assert_same_bits
from support.training import FAMILIES, reward, tokenizer, transformer
from torch import Tensor

from softdimo_fast._config import ConfigError
from softdimo_fast.diffusion import Draws, OneStepConfig, decode_logits, initial_embeddings
from softdimo_fast.trainers import TestTimeConfig, TestTimeEmbeddingOptimizer, TestTimeResult

COUNT = 7
DRAWS = Draws.of(3, 0, COUNT)
ONE_STEP = OneStepConfig(initial_ratio=(0.3, 0.8), sigma=0.4)
CONDITION = torch.arange(COUNT) % 2


def search(
    family: str = "token", rewarding: Any = None, **options: Any
) -> TestTimeEmbeddingOptimizer:
    config = TestTimeConfig(**{"one_step": ONE_STEP, "learning_rate": 2.0} | options)
    rewarding = rewarding or reward()
    return TestTimeEmbeddingOptimizer(
        transformer(family, seed=2), tokenizer(family), rewarding, config
    )


def soft_reward(optimizer: TestTimeEmbeddingOptimizer, embeddings: Tensor) -> Tensor:
    logits = optimizer.generator.logits(embeddings, CONDITION)
    value: Tensor = optimizer.reward(optimizer.tokenizer.decode_soft(logits), CONDITION)
    return value


def candidates(optimizer: TestTimeEmbeddingOptimizer, count: int) -> list[Tensor]:
    return [
        initial_embeddings(
            optimizer.generator, DRAWS.fork(f"candidate/{i}"), ratio=ONE_STEP.initial_ratio,
            sigma=ONE_STEP.sigma,
        )
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"optimizer": "adam", "learning_rate": 0.05}]
)
def test_the_reward_rises_and_never_falls(family: str, options: dict[str, Any]) -> None:
    optimizer = search(family, iterations=6, **options)
    result = optimizer(CONDITION, CONDITION, DRAWS)
    assert bool((result.reward >= result.initial_reward).all())
    assert float((result.reward - result.initial_reward).mean()) > 0.005
    assert result.history.shape == (7, COUNT)
    torch.testing.assert_close(result.history[0], result.initial_reward)
    torch.testing.assert_close(result.reward, result.history.max(0).values)
    # What is handed back is what had that reward.
    torch.testing.assert_close(soft_reward(optimizer, result.embeddings), result.reward)
    assert not result.embeddings.requires_grad


class Turning:
    """The real reward, plus a little more or less at every call."""

    def __init__(self, change: float) -> None:
        self.reward, self.change, self.calls = reward(), change, 0

    def __call__(self, images: Tensor, condition: Tensor) -> Tensor:
        self.calls += 1
        value: Tensor = self.reward(images, condition)
        return value + self.change * self.calls


def test_the_best_is_kept_where_every_step_makes_it_worse() -> None:
    optimizer = search(rewarding=Turning(-1.0), iterations=4)
    result = optimizer(CONDITION, CONDITION, DRAWS)
    assert bool((result.history[1:] < result.initial_reward).all())
    assert_same_bits(result.reward, result.initial_reward)
    assert_same_bits(result.embeddings, candidates(optimizer, 1)[0].detach())


@pytest.mark.parametrize("n", [1, 4])
def test_without_iterations_it_is_best_of_n(n: int) -> None:
    optimizer = search(candidates=n, iterations=0)
    result = optimizer(CONDITION, CONDITION, DRAWS)
    inputs = candidates(optimizer, n)
    with torch.no_grad():
        rewards = torch.stack([soft_reward(optimizer, embeddings) for embeddings in inputs])
    best = rewards.argmax(0)
    torch.testing.assert_close(result.reward, rewards.max(0).values)
    expected = torch.stack(inputs)[best, torch.arange(COUNT)]
    assert_same_bits(result.embeddings, expected.detach())
    torch.testing.assert_close(result.images, result.initial_images)
    assert result.history.shape == (1, COUNT)
    if n > 1:
        assert len(set(best.tolist())) > 1


def test_more_candidates_start_from_the_same_first_ones() -> None:
    few, many = (search(candidates=n, iterations=2)(CONDITION, CONDITION, DRAWS) for n in (2, 5))
    assert bool((many.initial_reward >= few.initial_reward).all())


@pytest.mark.parametrize(
    "options", [{"momentum": 0.5}, {"optimizer": "adam", "learning_rate": 0.05}]
)
def test_no_result_depends_on_the_batch_size(options: dict[str, Any]) -> None:
    whole, cut = (
        search(candidates=2, iterations=3, batch_size=size, **options)(CONDITION, CONDITION, DRAWS)
        for size in (256, 3)
    )
    for name in TestTimeResult.__dataclass_fields__:
        first, second = getattr(whole, name), getattr(cut, name)
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-3, msg=name)


def test_no_weight_changes() -> None:
    optimizer = search(iterations=3, candidates=2)
    modules = {"generator": optimizer.generator, "tokenizer": optimizer.tokenizer}
    before = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in modules.items()}
    optimizer(CONDITION, CONDITION, DRAWS)
    for name, module in modules.items():
        assert all(p.grad is None for p in module.parameters())
        for key, value in module.state_dict().items():
            assert_same_bits(before[name][key], value, key)


def step_of(optimizer: TestTimeEmbeddingOptimizer) -> tuple[Tensor, Tensor]:
    """The start, and where one SGD step with learning rate 1 leads: it is the best by construction."""
    result = optimizer(CONDITION, CONDITION, DRAWS)
    return candidates(optimizer, 1)[0].detach(), result.embeddings


class Constant:
    """A reward that pulls nowhere, and says that later inputs are better."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: Tensor, condition: Tensor) -> Tensor:
        self.calls += 1
        return 0 * images.flatten(1).sum(1) + self.calls


def test_the_gradient_of_the_norm_regulariser() -> None:
    """|e|^2 / 2 - (d - 1) log |e| pulls to the radius sqrt(d - 1)."""
    optimizer = search(
        rewarding=Constant(), iterations=1, learning_rate=1.0, regularization="norm",
        regularization_weight=0.01,
    )  # fmt: skip
    start, moved = step_of(optimizer)
    flat = start.flatten(1)
    d = flat.shape[1]
    expected = 0.01 * (1 - (d - 1) / flat.square().sum(1, keepdim=True)) * flat
    torch.testing.assert_close((start - moved).flatten(1), expected, atol=1e-6, rtol=1e-3)


def test_the_gradient_of_the_distance_regulariser() -> None:
    """It is 0 at the start and 2 w (e - e0) after it: the second step goes back."""
    weight = 0.2

    def after_two(**options: Any) -> Tensor:
        optimizer = search(rewarding=Turning(1.0), iterations=2, learning_rate=1.0, **options)
        return optimizer(CONDITION, CONDITION, DRAWS).embeddings

    free = after_two()
    held = after_two(regularization="distance", regularization_weight=weight)
    start, first = step_of(search(rewarding=Turning(1.0), iterations=1, learning_rate=1.0))
    torch.testing.assert_close(free - held, 2 * weight * (first - start), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("decode", ["sample", "argmax", "soft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_the_decode_of_the_embeddings(family: str, decode: Any) -> None:
    optimizer = search(family, iterations=1, decode=decode)
    result = optimizer(CONDITION, CONDITION, DRAWS)
    for embeddings, shown in [
        (result.embeddings, result.images),
        (candidates(optimizer, 1)[0], result.initial_images),
    ]:
        with torch.no_grad():
            logits = optimizer.generator.logits(embeddings, CONDITION)
            expected = decode_logits(optimizer.tokenizer, logits, DRAWS, decode)
        torch.testing.assert_close(shown, expected, atol=1e-5, rtol=1e-4)


def test_the_target_may_differ_from_the_condition() -> None:
    optimizer = search(iterations=4)
    other = optimizer(CONDITION, 1 - CONDITION, DRAWS)
    same = optimizer(CONDITION, CONDITION, DRAWS)
    assert bool((other.reward > other.initial_reward).any())
    assert not torch.allclose(other.reward, same.reward)


def test_a_stop_is_asked_for_before_every_pass() -> None:
    polls: list[int] = []

    def stop_at(n: int) -> Any:
        polls.clear()

        def stop() -> bool:
            polls.append(1)
            return len(polls) >= n

        return stop

    optimizer = search(candidates=2, iterations=3, batch_size=4)
    for n in (1, 2, 5, 12):
        with pytest.raises(InterruptedError, match="asked to stop"):
            optimizer(CONDITION, CONDITION, DRAWS, stop=stop_at(n))
        assert len(polls) == n
    # Two batches of 2 candidates and 4 looks at the reward.
    optimizer(CONDITION, CONDITION, DRAWS, stop=stop_at(99))
    assert len(polls) == 12


def test_nan_never_wins() -> None:
    class Broken(Constant):
        """No number for the first candidate of the even samples, and for all gradients of the odd."""

        def __call__(self, images: Tensor, condition: Tensor) -> Tensor:
            self.calls += 1
            value: Tensor = reward()(images, condition)
            even = torch.arange(COUNT) % 2 == 0
            if self.calls == 1:
                return value.masked_fill(even, torch.nan)
            return value + torch.where(even, 0, (0 * images.sum((1, 2, 3))).sqrt())

    result = search(rewarding=Broken(), candidates=2, iterations=2)(CONDITION, CONDITION, DRAWS)
    assert bool(result.reward.isfinite().all())
    assert bool(result.embeddings.isfinite().all())


def test_counts_must_agree() -> None:
    with pytest.raises(ValueError, match="same samples, got 7, 6 and 7"):
        search()(CONDITION, CONDITION[:6], DRAWS)
    with pytest.raises(ValueError, match="same samples, got 7, 7 and 3"):
        search()(CONDITION, CONDITION, DRAWS.part(0, 3))


def test_works_where_gradients_are_off() -> None:
    optimizer = search(iterations=2)
    with torch.no_grad():
        result = optimizer(CONDITION, CONDITION, DRAWS)
    torch.testing.assert_close(result.reward, optimizer(CONDITION, CONDITION, DRAWS).reward)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 0}, "candidates: must be a number >= 1, got 0"),
        ({"iterations": -1}, "iterations"),
        ({"regularization": "norm"}, "regularization_weight: must be non-zero"),
        ({"regularization_weight": 0.1}, "regularization_weight: .* 0 otherwise"),
        ({"optimizer": "lbfgs"}, "optimizer: must be .*'sgd'.*'adam'"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TestTimeConfig(**options)
