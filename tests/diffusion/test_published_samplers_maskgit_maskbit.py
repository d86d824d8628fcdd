"""The samplers of the published MaskGIT and MaskBit teachers: schedules, traces, the shared loop."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.checks import assert_same_bits
from support.maskgit_maskbit import build, fixture, needs_fixtures, table
from torch import Tensor, nn

from softdimo_fast import _config
from softdimo_fast.diffusion import (
    MASKBIT_SAMPLERS,
    ConfidenceSamplerConfig,
    DecodingPlan,
    DecodingStep,
    Draws,
    InjectedNoise,
    MaskBitSamplerConfig,
    MaskGitSamplerConfig,
    OneStepConfig,
    confidence_sample,
    guidance_from_weight,
    initial_tokens,
    mask_ratio,
    masked_count,
    sampling_ratio,
)
from softdimo_fast.diffusion.published_samplers import unmask_counts
from softdimo_fast.models.maskbit import MaskBitGenerator, MaskBitGeneratorConfig, join_splits
from softdimo_fast.models.maskgit import MaskGitConfig, MaskGitTransformer
from softdimo_fast.models.seeding import seeded
from softdimo_fast.trainers.ema import EmaConfig
from softdimo_fast.trainers.generator import GeneratorConfig

SCHEDULES = ("arccos", "cosine", "linear", "square", "root")
SAMPLERS = (
    ConfidenceSamplerConfig(steps=5, guidance_scale=3.0),
    MaskGitSamplerConfig(steps=5),
    MaskGitSamplerConfig(steps=5, mask_column=True),
    MaskBitSamplerConfig(steps=5),
    MaskBitSamplerConfig(steps=5, temperature_annealing=True, schedule="cosine"),
)


def small(family: str) -> Any:
    """A model with weights far from zero, so that its logits differ."""
    with seeded(3):
        if family == "maskgit":
            config = MaskGitConfig(
                img_size=48, hidden_dim=16, codebook_size=11, depth=1, heads=2, mlp_dim=16, nclass=3
            )
            model: nn.Module = MaskGitTransformer(config)
        else:
            bit_config = MaskBitGeneratorConfig(
                img_size=48, hidden_dim=16, codebook_size=64, depth=1, heads=2, mlp_dim=16, nclass=3
            )
            model = MaskBitGenerator(bit_config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def run(
    model: Any, config: Any, noise: Any, labels: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The sample, and what each pass saw and drew."""
    seen: list[Tensor] = []
    drawn: list[Tensor] = []

    def observe(number: int, tokens: Tensor, predicted: Tensor) -> None:
        assert number == len(seen)
        seen.append(tokens)
        drawn.append(predicted)

    return confidence_sample(model, labels, noise, config, observe=observe), seen, drawn


# ---- the published runs ------------------------------------------------------------------------------------


def injected(tensors: dict[str, Tensor], variant: str) -> InjectedNoise:
    if variant == "greedy":
        return InjectedNoise()
    return InjectedNoise(tensors["in/categorical_gumbel"], tensors["in/order_gumbel"])


@needs_fixtures
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("variant", ["greedy", "noisy"])
def test_maskgit_trace(variant: str, dtype: torch.dtype) -> None:
    data = fixture("maskgit_sampler_trace")
    settings, expected = data.facts["settings"], data.part(f"out/{variant}")
    config = MaskGitSamplerConfig(
        steps=settings["steps"],
        guidance_scale=guidance_from_weight(settings["w"]),
        temperature=settings["softmax_temperature"],
        confidence_temperature=settings["r_temp"],
        schedule=settings["schedule"],
        mask_column=True,
    )
    model = build(data.facts["weights_from"], dtype)
    noise = injected(data.tensors, variant)
    tokens, seen, _ = run(model, config, noise, data.tensors["in/labels"])
    assert torch.equal(torch.stack(seen), expected["step_codes"].flatten(2))
    assert torch.equal(tokens, expected["final_codes"].flatten(1))


@needs_fixtures
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("variant", ["greedy", "noisy"])
@pytest.mark.parametrize("bits", [10, 14])
def test_maskbit_trace(bits: int, variant: str, dtype: torch.dtype) -> None:
    data = fixture(f"maskbit_sampler_trace_{bits}bit")
    settings, expected = data.facts["settings"], data.part(f"out/{variant}")
    model = build(data.facts["weights_from"], dtype)
    noise, labels = injected(data.tensors, variant), data.tensors["in/labels"].clone()
    tokens, seen, drawn = run(model, maskbit_config(settings), noise, labels)
    assert torch.equal(torch.stack(seen), expected["step_tokens"])
    assert torch.equal(torch.stack(drawn), expected["step_predicted"])
    assert torch.equal(join_splits(tokens, model.config.split_bits), expected["final_joint"])
    assert torch.equal(labels, data.tensors["in/labels"])


def maskbit_config(settings: dict[str, Any]) -> MaskBitSamplerConfig:
    assert settings["guidance_annealing"] == "cosine"
    schedule = settings.get("mask_schedule_strategy") or settings["gen_mask_schedule_strategy"]
    return MaskBitSamplerConfig(
        steps=settings["num_steps"],
        guidance_scale=guidance_from_weight(settings["guidance_scale"]),
        guidance_power=settings["scale_pow"],
        temperature=settings["softmax_temperature"],
        temperature_annealing=settings["use_sampling_annealing"],
        confidence_temperature=settings["randomize_temperature"],
        schedule=schedule,
    )


# ---- the published schedules -------------------------------------------------------------------------------


@needs_fixtures
def test_maskgit_counts_and_guidance() -> None:
    published = table("schedules_maskgit")
    for grid, schedules in published["unmask_counts"].items():
        positions = int(grid.removeprefix("grid")) ** 2
        for schedule, cases in schedules.items():
            for steps, counts in cases.items():
                assert unmask_counts(schedule, int(steps), positions) == counts
                config = MaskGitSamplerConfig(steps=int(steps), schedule=schedule)
                assert [step.fixed for step in config.plan(positions).steps] == counts
    guidance = published["sampler_guidance"]
    for steps, weights in guidance["steps"].items():
        scale = guidance_from_weight(guidance["w"])
        config = MaskGitSamplerConfig(steps=int(steps), guidance_scale=scale)
        plan = config.plan(256).steps
        assert [step.guidance - 1 for step in plan] == pytest.approx(weights, abs=1e-12)
        heats = [4.5 * (1 - i / (int(steps) - 1)) for i in range(int(steps))]
        assert [step.heat for step in plan] == pytest.approx(heats, abs=1e-12)
        assert {step.temperature for step in plan} == {1.0}


@needs_fixtures
def test_maskgit_training_masks() -> None:
    published = table("schedules_maskgit")
    for schedule, case in published["mask_ratio"].items():
        ratio = mask_ratio(schedule, torch.tensor(case["r"]))
        torch.testing.assert_close(ratio, torch.tensor(case["ratio"]), atol=1e-7, rtol=0)
        assert masked_count(ratio, 256).tolist() == case["masked_of_256"]
    ties = published["mask_count_rounding_ties"]
    counts = masked_count(mask_ratio(ties["mode"], torch.tensor(ties["r"])), 256)
    assert counts.tolist() == ties["masked_of_256"]


@needs_fixtures
def test_maskgit_generator_inputs() -> None:
    published = table("schedules_maskgit")
    model = small("maskgit")
    model.token_shape = (256,)  # only the shape is looked at
    case = published["x_init_mask_count"]
    for ratio, expected in zip(case["r_init"], case["masked_of_256"], strict=True):
        masked = int((initial_tokens(model, Draws.of(0, 0, 1), ratio) == model.mask_id).sum())
        # The public code masks one position even at r_init 0; ours means what it says.
        assert masked == (expected if ratio else 0)
    steps = published["embedding_noise_sigma_at_steps"]
    schedules = {"linear": "linear", "cos": "cosine", "exp": "exponential"}
    for name, schedule in schedules.items():
        config = GeneratorConfig(
            one_step=OneStepConfig(sigma=1.0), sigma_schedule=schedule, sigma_steps=1000
        )
        ours = [config.one_step_at(step).sigma for step in steps]
        assert ours == pytest.approx(
            published["embedding_noise_sigma"][f"warmup_{name}_1000"], abs=1e-7
        )
    for step, rate in published["ema_rate"].items():
        assert EmaConfig().kept(int(step)) == pytest.approx(rate, abs=1e-12)


@needs_fixtures
def test_maskbit_schedules() -> None:
    published = table("schedules_maskbit")
    for name, settings in published["settings"].items():
        config = maskbit_config(settings)
        plan, rows = config.plan(settings["num_maskable"]).steps, settings["steps"]
        if name in {f"maskbit_generator_{bits}bit" for bits in MASKBIT_SAMPLERS}:
            assert config == MASKBIT_SAMPLERS[settings["bits"]]
        assert len(plan) == len(rows)
        for step, row in zip(plan, rows, strict=True):
            assert step.number == row["step"]
            assert step.guidance - 1 == pytest.approx(row["guidance_w"], abs=2e-5)
            assert step.temperature == row["softmax_temperature"]
            assert step.heat == pytest.approx(row["noise_multiplier"], abs=1e-12)
            assert step.left + step.fixed == row["masked_before"]
            assert step.left == (row["masked_after"] or 0)  # null after the last
    for schedule, case in published["sampling_mask_ratio"].items():
        ratio = sampling_ratio(schedule, torch.tensor(case["progress"])).clamp(1e-6, 1)
        torch.testing.assert_close(ratio, torch.tensor(case["ratio"]), atol=1e-7, rtol=0)
    for schedule, case in published["training_mask_fraction"].items():
        ratio = sampling_ratio(schedule, torch.tensor(case["r"]))
        expected = torch.tensor(case["fraction_on_grid"])
        torch.testing.assert_close(ratio, expected, atol=6e-5, rtol=0)


# ---- what holds without the published data -----------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("positions", [1, 2, 9, 256])
@pytest.mark.parametrize("steps", [2, 3, 8, 16])
def test_plans_fix_everything_once(steps: int, positions: int, schedule: Any) -> None:
    assert sum(unmask_counts(schedule, steps, positions)) == positions
    for config in (
        MaskGitSamplerConfig(steps=steps, schedule=schedule),
        MaskBitSamplerConfig(steps=steps, schedule=schedule),
        ConfidenceSamplerConfig(steps=steps),
    ):
        plan = config.plan(positions).steps
        assert plan[-1].left == 0
        assert all(step.fixed > 0 for step in plan)
        before = [positions, *(step.left for step in plan)]
        assert all(b - s.fixed == s.left for b, s in zip(before, plan, strict=False))
        assert all(after < now for now, after in pairwise(before))


def test_published_numbers() -> None:
    """Some of the tables, so that they are held without the published data."""
    assert unmask_counts("arccos", 8, 256) == [1, 18, 26, 32, 38, 43, 48, 50]
    assert unmask_counts("cosine", 12, 256) == [1, 5, 10, 14, 18, 22, 26, 29, 31, 33, 34, 33]
    assert unmask_counts("linear", 8, 256) == [1, 9, 18, 27, 37, 46, 55, 63]  # half to even
    plan = MASKBIT_SAMPLERS[14].plan(512).steps
    assert [step.left for step in plan[:6]] == [506, 501, 496, 491, 486, 481]
    assert [step.left for step in plan[-2:]] == [57, 0]
    assert plan[0].guidance == 1.0
    assert plan[-1].guidance - 1 == pytest.approx(7.062759, abs=2e-5)
    assert plan[0].heat == pytest.approx(7.678125)
    assert plan[-1].heat == 0.0
    annealed = MaskBitSamplerConfig(steps=4, temperature_annealing=True).plan(512).steps
    assert [step.temperature for step in annealed] == pytest.approx([1.1, 0.9, 0.7, 0.5])


def test_guidance_conventions_agree() -> None:
    """Oracle 12: u + s (c - u) with s = 1 + w is c + w (c - u)."""
    c, u = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w = 7.1
    torch.testing.assert_close(u + guidance_from_weight(w) * (c - u), c + w * (c - u))


@pytest.mark.parametrize("config", SAMPLERS, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("family", ["maskgit", "maskbit"])
def test_every_sampler_samples_every_family(family: str, config: Any) -> None:
    model, draws = small(family), Draws.of(1, 0, 7)
    labels = draws.integers("labels", 3)
    if getattr(config, "mask_column", False) and family == "maskbit":
        with pytest.raises(ValueError, match="mask_column needs a model with a"):
            confidence_sample(model, labels, draws, config)
        return
    tokens, seen, drawn = run(model, config, draws, labels)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (7, *model.token_shape)
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < model.vocabulary
    plan = config.plan(math.prod(model.token_shape)).steps
    assert len(seen) == len(drawn) == len(plan)
    if not getattr(config, "mask_column", False):
        left = [(step == model.mask_id).flatten(1).sum(1).tolist() for step in seen[1:]]
        assert left == [[step.left] * 7 for step in plan[:-1]]
        assert all(int(step.max()) < model.vocabulary for step in drawn)
        for before, after in pairwise([*seen, tokens]):
            kept = before != model.mask_id
            assert torch.equal(before[kept], after[kept])
    parts = [draws.part(0, 3), draws.part(3, 4)]
    apart = [confidence_sample(model, labels[p.first : p.first + len(p)], p, config) for p in parts]
    assert_same_bits(tokens, torch.cat(apart))


def test_the_mask_column_is_drawn_only_if_asked() -> None:
    model, draws = small("maskgit"), Draws.of(0, 0, 40)
    with torch.no_grad():
        model.bias[:, model.mask_id] = 30.0  # [MASK] is by far the likeliest
    labels = draws.integers("labels", 3)
    tokens, seen, drawn = run(model, MaskGitSamplerConfig(steps=3), draws, labels)
    assert int(torch.stack(drawn).max()) < model.vocabulary
    assert tokens.unique().numel() > 1
    asked = MaskGitSamplerConfig(steps=3, mask_column=True)
    tokens, seen, drawn = run(model, asked, draws, labels)
    # Every draw is [MASK], counts as fixed, and shows the last code in the end.
    assert set(torch.stack(drawn).flatten().tolist()) == {model.mask_id}
    assert set(tokens.flatten().tolist()) == {model.vocabulary - 1}
    assert len(seen) == 3


class _Sampler:
    def __init__(self, plan: DecodingPlan) -> None:
        self._plan = plan

    def plan(self, positions: int) -> DecodingPlan:
        return self._plan


class _Fixed(nn.Module):
    """Stands in for a model: its logits are given, whatever it sees."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = logits
        self.vocabulary = self.mask_id = logits.shape[-1]
        self.token_shape = logits.shape[1:-1]

    @property
    def token_table(self) -> Tensor:
        return self.table

    def embed(self, tokens: Tensor) -> Tensor:
        return tokens

    def masked_condition(self, condition: Tensor, mask: Tensor) -> Tensor:
        return condition

    def unconditional(self, condition: Tensor) -> Tensor:
        return condition

    def forward(self, embeddings: Tensor, condition: Tensor) -> Tensor:
        return self.table.repeat(len(embeddings) // len(self.table), 1, 1)

    def head(self, hidden: Tensor, rows: Tensor) -> Tensor:
        return hidden.flatten(0, 1)[rows]


# Confidences, likeliest first: position 3, then 0, 1 and 4 alike, then 2.
PEAKS = torch.tensor([[2.0, 2.0, 1.0, 3.0, 2.0]])
TIED = torch.stack([PEAKS, torch.zeros_like(PEAKS)], dim=-1)


@pytest.mark.parametrize(
    ("ties", "expected"),
    [
        ("fixed", {3, 0, 1, 4}),  # all that are as sure as the second
        ("masked", {3}),  # none that is as unsure as the third from below
        ("exact", None),
    ],
)
def test_ties(ties: Any, expected: set[int] | None) -> None:
    steps = (DecodingStep(0, fixed=2, left=3), DecodingStep(1, fixed=3, left=0))
    plan = DecodingPlan(steps=steps, ties=ties)
    model = _Fixed(TIED)
    _, seen, _ = run(model, _Sampler(plan), InjectedNoise(), torch.zeros(1, dtype=torch.int64))
    fixed = set((seen[1][0] != model.mask_id).nonzero()[:, 0].tolist())
    if expected is None:
        assert len(fixed) == 2
        assert fixed < {3, 0, 1, 4}
        assert 3 in fixed
    else:
        assert fixed == expected


def test_the_draws_heat_and_the_ranking_by_logits() -> None:
    """What MaskGen's plan needs: Gumbel noise times a factor in the draw, confidences that are logits."""
    logits = torch.tensor([[[0.0, 0.5, 1.0], [5.0, 4.0, 6.0]]])
    noise = torch.zeros(2, 1, 2, 3)
    noise[0, 0, :, 1] = 1.0
    cold = DecodingStep(0, fixed=1, left=1, draw_heat=0.3, temperature=0.5)
    hot = cold._replace(draw_heat=4.0)
    for first, expected in ((cold, [2, 2]), (hot, [1, 1])):
        plan = DecodingPlan(steps=(first, DecodingStep(1, fixed=1, left=0)), confidence="logit")
        _, seen, drawn = run(
            _Fixed(logits), _Sampler(plan), InjectedNoise(tokens=noise), torch.zeros(1)
        )
        assert drawn[0][0].tolist() == expected
        assert (seen[1][0] == 3).tolist() == [True, False]  # the larger logit, not log-probability
    # Drawn noise at heat h is a draw at temperature T h.
    n = 20_000
    step = DecodingStep(0, fixed=2, left=0, draw_heat=2.0, temperature=0.5)
    many = _Fixed(logits.expand(n, -1, -1))
    sampler = _Sampler(DecodingPlan(steps=(step,)))
    tokens = confidence_sample(many, torch.zeros(n), Draws.of(0, 0, n), sampler)  # type: ignore[arg-type]
    share = torch.nn.functional.one_hot(tokens, 3).double().mean(0)
    law = logits[0].double().softmax(-1)
    assert float(((share - law) / (law * (1 - law) / n).sqrt()).abs().max()) < 4.5
    # Without heat the likeliest comes.
    still = _Sampler(DecodingPlan(steps=(step._replace(draw_heat=0.0),)))
    tokens = confidence_sample(many, torch.zeros(n), Draws.of(0, 0, n), still)  # type: ignore[arg-type]
    assert set(tokens.flatten().tolist()) == {2}


def test_errors() -> None:
    with pytest.raises(_config.ConfigError, match="steps"):
        MaskGitSamplerConfig(steps=1)
    with pytest.raises(_config.ConfigError, match="schedule"):
        MaskBitSamplerConfig(schedule="mage")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="schedule must be arccos"):
        sampling_ratio("mage", torch.zeros(1))  # type: ignore[arg-type]
    model, labels = small("maskgit"), torch.zeros(2, dtype=torch.int64)
    config = MaskGitSamplerConfig(steps=2, mask_column=True)
    with pytest.raises(ValueError, match=r"tokens must have shape \[S, 2, 9, 12\]"):
        confidence_sample(model, labels, InjectedNoise(tokens=torch.zeros(2, 2, 9, 11)), config)
    with pytest.raises(ValueError, match=r"order must have shape \[S, 2, 9\]"):
        confidence_sample(model, labels, InjectedNoise(order=torch.zeros(2, 9, 2)), config)
