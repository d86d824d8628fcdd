"""From the prompt file to the reward: the words of a sample reach the generator and what judges its image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checks import assert_same_bits
from support.text_families import TEXT, TRANSFORMERS, meissonic_vq, tatitok
from support.training import generator, snapshot, trainer
from torch import Tensor, nn
from torch.nn import functional as F

from softdimo_fast.data.prompts import PromptConditions, PromptFile
from softdimo_fast.diffusion import Draws
from softdimo_fast.models.text_encoders import (
    ClipText,
    MaskGenTextEncoder,
    MeissonicTextEncoder,
    TextFeatures,
)
from softdimo_fast.rewards import ClipReward, WeightedRewards
from softdimo_fast.rewards.clip import ClipTowers
from softdimo_fast.trainers import (
    RewardConfig,
    RewardObjective,
    TestTimeConfig,
    TestTimeEmbeddingOptimizer,
)

BATCH, WIDTH, SIZE = 6, 10, 8
FAMILIES: dict[str, tuple[Any, Any, int]] = {
    "maskgen": (MaskGenTextEncoder, tatitok, 10),
    "meissonic": (MeissonicTextEncoder, meissonic_vq, 16),
}


def _bytes(prompts: Sequence[str]) -> Tensor:
    return torch.tensor([[*p.encode()[-TEXT:].rjust(TEXT, b" ")] for p in prompts])


def _table(width: int, seed: int) -> nn.Embedding:
    weight = torch.randn(256, width, generator=torch.Generator().manual_seed(seed))
    return nn.Embedding.from_pretrained(weight)


class Tower(ClipText):
    """Text features of the widths that the small models have."""

    def __init__(self, pooled: int) -> None:
        model = nn.ModuleDict({"rows": _table(WIDTH, 0), "pooled": _table(pooled, 1)})
        super().__init__(model, _bytes)

    def features(self, ids: Tensor) -> TextFeatures:
        model: Any = self.model
        rows = model["rows"](ids)
        return TextFeatures(rows, rows.cumsum(1), model["pooled"](ids).sum(1))


class Towers(ClipTowers):
    """Of a reward; remembers the prompts it is asked about."""

    size = SIZE

    def __init__(self) -> None:
        model: Any = nn.Module()
        model.words = _table(7, 2)
        image = torch.randn(3 * SIZE * SIZE, 7, generator=torch.Generator().manual_seed(3))
        model.image, model.logit_scale = nn.Parameter(image), nn.Parameter(torch.tensor(1.0))
        super().__init__(model, _bytes)

    def images(self, pixels: Tensor) -> Tensor:
        model: Any = self.model
        return pixels.flatten(1) @ model.image

    def ids(self, ids: Tensor) -> Tensor:
        model: Any = self.model
        return F.normalize(model.words(ids).sum(1), dim=-1)


@pytest.fixture
def prompts(tmp_path: Path) -> PromptFile:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"number {n}\n" for n in range(9)))
    return PromptFile(path)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def conditions(family: str, prompts: PromptFile, **options: Any) -> PromptConditions:
    encoder, _, pooled = FAMILIES[family]
    return PromptConditions(prompts, encoder(Tower(pooled)), BATCH, **options)


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
    method.conditions = conditions(family, prompts, **options)
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
    source, towers = conditions(family, prompts), Towers()
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
    condition = conditions(family, prompts)(draws)
    result = search(condition, condition, draws)
    assert bool((result.reward >= result.initial_reward).all())
