"""From the prompt file to the reward: the words of a sample reach the generator and what judges its image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checks import assert_same_bits
from support.prompted import FAMILIES, SIZE, Towers, conditions
from support.text_families import TRANSFORMERS
from support.training import generator, snapshot, trainer
from torch import Tensor

from softdimo_fast.data.prompts import PromptFile
from softdimo_fast.diffusion import Draws
from softdimo_fast.rewards import ClipReward, WeightedRewards
from softdimo_fast.trainers import (
    RewardConfig,
    RewardObjective,
    TestTimeConfig,
    TestTimeEmbeddingOptimizer,
)

BATCH = 6


@pytest.fixture
def prompts(tmp_path: Path) -> PromptFile:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"number {n}\n" for n in range(9)))
    return PromptFile(path)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Asked(ClipReward):
    """Keeps the numbers of the prompts it was asked about."""

    def forward(self, images: Tensor, condition: Any) -> Tensor:
        self.numbers = condition.prompt
        return super().forward(images, condition)


def run_steps(family: str, prompts: PromptFile, **options: Any) -> tuple[dict[str, Tensor], Asked]:
    reward = Asked(Towers(), prompts)
    _, tokenizer, _ = FAMILIES[family]
    objective = RewardObjective(tokenizer(), WeightedRewards({"clip": reward}), RewardConfig())
    method = generator(objective, student=TRANSFORMERS[family][0]())
    method.conditions = conditions(family, prompts, BATCH, **options)
    run = trainer(method, steps=2, batch_size=BATCH)
    before = snapshot(run)
    run.run()
    after = snapshot(run)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    return after, reward


def test_the_generator_trains_on_the_prompts(family: str, prompts: PromptFile) -> None:
    kept, reward = run_steps(family, prompts)
    assert all(bool(t.isfinite().all()) for t in kept.values() if t.is_floating_point())
    assert set(reward.numbers.tolist()) <= set(range(9))
    nothing_kept, _ = run_steps(family, prompts, capacity=0)
    for name, value in kept.items():
        assert_same_bits(nothing_kept[name], value)


def test_the_reward_reads_the_words_of_its_own_sample(family: str, prompts: PromptFile) -> None:
    source, towers = conditions(family, prompts, BATCH), Towers()
    draws = Draws.of(4, 1, BATCH)
    pixels = torch.rand(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
    found = ClipReward(towers, prompts)(pixels, source(draws))
    for b, text in enumerate(source.texts(draws)):
        alone = ClipReward(towers, [text])(pixels[b : b + 1], torch.tensor([0]))
        torch.testing.assert_close(found[b : b + 1], alone)


def test_search_at_test_time(family: str, prompts: PromptFile) -> None:
    student, reward = TRANSFORMERS[family][0](), ClipReward(Towers(), prompts)
    search = TestTimeEmbeddingOptimizer(
        student, FAMILIES[family][1](), reward, TestTimeConfig(candidates=2, iterations=2)
    )
    draws = Draws.of(0, 0, BATCH)
    condition = conditions(family, prompts, BATCH)(draws)
    result = search(condition, condition, draws)
    assert bool((result.reward >= result.initial_reward).all())
