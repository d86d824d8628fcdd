"""The recipes of the published teachers: their numbers, what is open, and that they are whole configs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.published_runs import RECIPES, TEXT_RECIPES

from softdimo_fast import _config
from softdimo_fast.cli import main
from softdimo_fast.recipes import RECIPES as ALL
from softdimo_fast.recipes import recipe
from softdimo_fast.recipes.published import (
    LONGER,
    NEGATIVE_PROMPT,
    OPEN,
    TEACHERS,
    is_open,
    open_settings,
)
from softdimo_fast.recipes.published_runs import PublishedGeneratorRun, PublishedTestTimeRun

METHODS = ("distillation", "adversarial", "reward", "tteo")
RUNS = [(name, method) for name in RECIPES for method in METHODS] + [("maskbit", LONGER)]
TRAINED = [(name, method) for name, method in RUNS if method != "tteo"]


def value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


# ---- whole configs -----------------------------------------------------------------------------------------


def test_every_recipe_has_every_method() -> None:
    assert set(RECIPES) == set(TEACHERS) == set(ALL) - {"digits"}
    assert [(name, method) for name in RECIPES for method in ALL[name]] == sorted(
        RUNS, key=lambda run: RECIPES.index(run[0])
    )


@pytest.mark.parametrize(("name", "method"), RUNS)
def test_a_recipe_is_a_config_that_json_keeps(name: str, method: str) -> None:
    config = recipe(name, method)
    document = json.loads(json.dumps(_config.to_dict(config)))
    assert _config.from_dict(type(config), document) == config
    assert isinstance(config, PublishedTestTimeRun if method == "tteo" else PublishedGeneratorRun)


@pytest.mark.parametrize(("name", "method"), RUNS)
def test_what_must_be_given_is_what_a_machine_has_and_a_recipe_has_not(
    name: str, method: str
) -> None:
    text = name in TEXT_RECIPES
    expected = {"generator", "tokenizer"} if method == "tteo" else {"teacher"}
    if method in ("reward", "tteo"):
        expected |= {"tokenizer", "text.prompts", "rewards.clip.path", "rewards.image_reward.path"}
    if method == "tteo":
        expected |= {"rewards.hps.path", "rewards.pick_score.path"}
    if method in ("adversarial", LONGER):
        expected |= {"real_tokens"}
    if text:
        expected |= {"text.encoder", "text.prompts"}
    assert set(recipe(name, method).missing()) == expected


def test_a_seed_of_ones_own_takes_the_place_of_the_published_one() -> None:
    seeds = {
        "maskgit": 3407,
        "maskbit": 3407,
        "maskgen_l": 3407,
        "maskgen_xl": 3407,
        "meissonic": 42,
    }
    for name, seed in seeds.items():
        assert recipe(name, "adversarial").trainer.seed == seed
        assert recipe(name, "tteo").seed == seed
        assert recipe(name, "reward", seed=0).trainer.seed == 0
        assert recipe(name, "tteo", seed=5).seed == 5
    assert recipe("digits", "tokenizer").trainer.seed == 0


# ---- the numbers -------------------------------------------------------------------------------------------

# Of the public Di[M]O code; the second column is Meissonic's.
DIMO: dict[str, tuple[Any, Any]] = {
    "generator.optimizer.learning_rate": (1e-5, 1e-6),
    "distillation.auxiliary_optimizer.learning_rate": (1e-5, 1e-6),
    "generator.optimizer.name": ("adamw", "adamw"),
    "generator.optimizer.betas": ((0.9, 0.999), (0.9, 0.999)),
    "generator.optimizer.weight_decay": (0.0, 0.0),
    "generator.optimizer.epsilon": (1e-6, 1e-6),
    "distillation.auxiliary_optimizer.betas": ((0.9, 0.999), (0.9, 0.999)),
    "distillation.auxiliary_optimizer.weight_decay": (0.0, 0.0),
    "distillation.auxiliary_optimizer.epsilon": (1e-6, 1e-6),
    "generator.optimizer.schedule.warmup_steps": (100, 100),
    "generator.optimizer.schedule.decay": ("none", "none"),
    "distillation.auxiliary_optimizer.schedule.warmup_steps": (100, 100),
    "generator.optimizer.clip_norm": (1.0, 1.0),
    "distillation.auxiliary_optimizer.clip_norm": (None, None),
    "generator.freeze_embeddings": (True, True),
    "trainer.autocast": ("bfloat16", "bfloat16"),
    "checkpoint_blocks": (False, True),
    "trainer.batch_size": (128, 16),
    "trainer.accumulation": (2, 8),
    "trainer.steps": (50_001, 20_000),
    "trainer.seed": (3407, 42),
    "distillation.divergence": ("forward_kl", "forward_kl"),
    "distillation.guidance_scale": (2.0, 4.0),
    "distillation.mask_schedule": ("arccos", "cosine"),
    "distillation.normalization": ("batch", "batch"),
    "distillation.weighting": (0.0, 0.0),
    "distillation.teacher_temperature": (1.0, 1.0),
    "distillation.auxiliary_temperature": (1.0, 1.0),
    "distillation.path": ("hard", "hard"),
    "distillation.auxiliary_steps": (1, 1),
    "distillation.auxiliary_label_smoothing": (0.1, 0.1),
    "distillation.auxiliary_soft_weight": (0.0, 0.0),
    "distillation.auxiliary_condition_drop": (0.0, 0.0),
    "distillation.adaptive_guidance": (False, False),
    "generator.one_step.initial_ratio": (0.6, 0.5),
    "generator.one_step.sigma": (0.1, 0.3),
    "generator.one_step.noise_scale": ("unit", "unit"),
    "generator.one_step.temperature": (1.0, 1.0),
    "generator.sigma_schedule": ("constant", "constant"),
    "generator.reuse_rollout": (False, False),
    "text.negative_prompt": ("", NEGATIVE_PROMPT),
    "text.micro": ((1024.0, 1024.0, 0.0, 0.0, 6.0), (1024.0, 1024.0, 0.0, 0.0, 6.0)),
    "timestep": ("condition", "condition"),
}


@pytest.mark.parametrize("name", DIMO)
def test_the_numbers_of_dimo(name: str) -> None:
    """Known ones are not open."""
    for column, teacher in enumerate(("maskgit", "meissonic")):
        assert value(recipe(teacher, "distillation"), name) == DIMO[name][column]
        assert not is_open(name, open_settings(teacher, "distillation"))


# Of Soft-Di[M]O, for every teacher: its Adam, warm-up, averages and precision are Di[M]O's.
SOFT: dict[str, Any] = {
    "generator.optimizer.name": "adamw",
    "generator.optimizer.schedule.warmup_steps": 100,
    "generator.optimizer.schedule.decay": "none",
    "generator.freeze_embeddings": True,
    "trainer.autocast": "bfloat16",
    "trainer.ema.decay": 0.9999,
    "distillation.path": "hard",
    "distillation.auxiliary_label_smoothing": 0.1,
    "distillation.weight": 1.0,
}


@pytest.mark.parametrize(("name", "method"), TRAINED)
def test_the_numbers_of_soft_dimo(name: str, method: str) -> None:
    run, unknown = recipe(name, method), open_settings(name, method)
    for setting, expected in SOFT.items():
        assert value(run, setting) == expected
        assert not is_open(setting, unknown)
    kept = [run.trainer.ema.kept(step) for step in (0, 1, 2, 89_990, 10**6)]
    assert kept == pytest.approx([1 / 10, 2 / 11, 3 / 12, 0.9999, 0.9999])
    if run.adversarial is not None:
        assert run.adversarial.mask_range == (0.0, 0.95)
        assert run.adversarial.relaxation == "soft"
        assert run.adversarial.loss == "non_saturating"
        assert run.adversarial.heads.class_projection == (name not in TEXT_RECIPES)
        assert len(run.adversarial.heads.layers_of(24)) == 6
    if run.reward is not None:
        assert run.reward.relaxation == "soft"
        assert set(run.rewards.named()) == {"clip", "image_reward"}
        assert run.adversarial is None


def test_the_longer_run_goes_on_from_the_adversarial_one() -> None:
    base, run = recipe("maskbit", "adversarial"), recipe("maskbit", LONGER)
    assert run.start == "adversarial"
    assert run.adversarial.weight == 200.0
    assert run.generator.optimizer.learning_rate == 5e-7
    assert run.generator.optimizer.weight_decay == 0.01
    assert run.generator.optimizer.name == "adamw"
    unknown = open_settings("maskbit", LONGER)
    assert (base.generator.warmup_steps, run.generator.warmup_steps) == (0, 100)
    assert is_open("generator.warmup_steps", unknown)
    assert not is_open("generator.warmup_steps", open_settings("maskbit", "adversarial"))
    assert not is_open("adversarial.weight", unknown)
    assert not is_open("generator.optimizer.learning_rate", unknown)
    changed = _config.difference(_config.to_dict(base), _config.to_dict(run))
    assert {line.split(":")[0] for line in changed} == {
        "start", "adversarial.weight", "generator.warmup_steps", "generator.optimizer.learning_rate",
        "generator.optimizer.weight_decay", "distillation.auxiliary_optimizer.learning_rate",
        "distillation.auxiliary_optimizer.weight_decay",
    }  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_the_numbers_of_the_search(name: str) -> None:
    run = recipe(name, "tteo")
    assert (run.search.optimizer, run.search.learning_rate) == ("sgd", 0.2)
    assert run.search.iterations in (2, 4)
    assert run.search.one_step == recipe(name, "distillation").generator.one_step
    assert set(run.rewards.named()) == {"clip", "image_reward", "hps", "pick_score"}
    weights = {key: source.weight for key, source in run.rewards.named().items()}
    # The nearest public ones: ReNO's.
    assert weights == {"clip": 0.01, "image_reward": 1.0, "hps": 5.0, "pick_score": 0.05}


def test_guidance_is_the_scale_of_the_public_dimo_code() -> None:
    """s of u + s (c - u): MaskBit's and MaskGen's w of c + w (c - u) is one less."""
    scales = {name: recipe(name, "distillation").distillation.guidance_scale for name in RECIPES}
    assert scales == {
        "maskgit": 2.0, "maskbit": 1 + 1.0, "maskgen_l": 1 + 3.0, "maskgen_xl": 1 + 3.0,
        "meissonic": 4.0,
    }  # fmt: skip
    assert recipe("maskgen_l", "distillation").text.score == 6.5
    assert recipe("maskbit", "distillation").bits == 14


# ---- what is open ------------------------------------------------------------------------------------------

# What the sources leave open, as it was collected from them, and a setting of each by which it is told.
COLLECTED = {
    "w_gan, w_reward, lambda_i": {
        "adversarial": ["adversarial.weight"], "reward": ["reward.weight", "rewards.clip.weight"],
    },
    "heads: architecture, layers, conditioning, optimiser, update ratio, loss, regulariser": {
        "adversarial": [
            "adversarial.heads.layers", "adversarial.heads.class_projection",
            "adversarial.heads.hidden", "adversarial.heads_optimizer.learning_rate",
            "adversarial.heads_steps", "adversarial.loss", "adversarial.r1",
            "adversarial.r1_weight",
        ],
    },
    "batch sizes and iterations of Soft-Di[M]O": {
        "adversarial": ["trainer.batch_size", "trainer.steps"], "reward": ["trainer.steps"],
    },
    "momentum, regulariser, reward weights and decode of the search": {
        "tteo": [
            "search.momentum", "search.regularization", "search.regularization_weight",
            "search.decode", "rewards.hps.weight", "rewards.pick_score.weight",
        ],
    },
    "the temperature of the soft embedding": {
        "adversarial": ["adversarial.temperature"], "reward": ["reward.temperature"],
    },
    "where the GAN's real images come from": {"adversarial": ["real_tokens"]},
}  # fmt: skip
STUDENTS = [
    "distillation.beta", "generator.one_step.initial_ratio", "generator.one_step.sigma",
    "distillation.guidance_scale",
]  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("what", COLLECTED)
def test_what_the_sources_leave_open_is_marked(name: str, what: str) -> None:
    for method, settings in COLLECTED[what].items():
        for setting in settings:
            value(recipe(name, method), setting)  # it exists
            assert is_open(setting, open_settings(name, method)), setting


def test_students_of_maskbit_and_maskgen_are_open_and_the_others_are_not() -> None:
    for name, method in TRAINED:
        for setting in STUDENTS:
            known = name in ("maskgit", "meissonic")
            assert is_open(setting, open_settings(name, method)) != known
    assert is_open("bits", open_settings("maskbit", "adversarial"))


@pytest.mark.parametrize("topic", OPEN)
def test_every_open_name_is_a_setting(topic: str) -> None:
    known = {*_config.names(PublishedGeneratorRun), *_config.names(PublishedTestTimeRun)}
    assert set(OPEN[topic]) <= known


def test_nothing_is_open_in_recipes_that_are_our_own() -> None:
    assert open_settings("digits", "adversarial") == ()


@pytest.mark.parametrize(("name", "method"), RUNS)
def test_config_shows_what_is_open(
    name: str, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", name, "--method", method]) == 0
    settings: dict[str, str] = {}
    for line in capsys.readouterr().out.splitlines():
        head, equals, _ = line.partition(" = ")
        if equals and not line.startswith(("#", " ")):
            last = head.strip()
            settings[last] = line
        elif settings and line.strip():
            settings[last] += line
    unknown = open_settings(name, method)
    assert settings
    for setting, text in settings.items():
        marked = "(our default: the paper leaves it open)" in text
        assert marked == is_open(setting, unknown), setting


def test_settings_as_shown_are_taken_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "maskgen_l", "--method", "reward", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert _config.from_dict(PublishedGeneratorRun, document) == recipe("maskgen_l", "reward")
