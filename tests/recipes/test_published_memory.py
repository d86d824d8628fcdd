"""Published teachers at their full sizes, on the meta device: what a run on them consists of and holds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.published_runs import RECIPES, tiny_model, tiny_run, write_files

from softdimo_fast.recipes import recipe
from softdimo_fast.recipes.build import build_trainer
from softdimo_fast.recipes.published_build import discriminator_heads
from softdimo_fast.recipes.published_memory import BYTES, GIB, estimate, published_models
from softdimo_fast.trainers import DistributionMatching
from softdimo_fast.trainers.generator import GeneratorMethod

# Parameters of teacher and tokenizer, as published (buffers not counted).
PARAMETERS = {
    "maskgit": (174_160_874, 72_141_699),
    "maskbit": (304_929_024, 54_489_489),
    "maskgen_l": (604_311_552, 391_046_292),
    "maskgen_xl": (1_176_611_840, 391_046_292),
    "meissonic": (1_006_946_304, 146_244_675),
}
# Tokens, token shape, [MASK], width and positions of the features.
SHAPES = {
    "maskgit": (1024, (256,), 1024, 768, 257),
    "maskbit": (128, (256, 2), 128, 1024, 257),
    "maskgen_l": (8192, (128,), 8192, 1024, 128),
    "maskgen_xl": (8192, (128,), 8192, 1280, 128),
    "meissonic": (8192, (4096,), 8255, 1024, 1024),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_roles_of_a_distillation_at_full_size(name: str) -> None:
    teacher, tokenizer = published_models(name)
    counted = tuple(sum(p.numel() for p in model.parameters()) for model in (teacher, tokenizer))
    assert counted == PARAMETERS[name]
    vocabulary, shape, mask_id, width, positions = SHAPES[name]
    assert (teacher.vocabulary, teacher.token_shape, teacher.mask_id) == (
        vocabulary,
        shape,
        mask_id,
    )
    assert (tokenizer.codebook.shape[-2], tokenizer.token_shape) == (vocabulary, shape)
    run = recipe(name, "adversarial")
    assert run.distillation is not None
    student, auxiliary = published_models(name)[0], published_models(name)[0]
    matching = DistributionMatching(teacher, auxiliary, run.distillation)
    method = GeneratorMethod(student, lambda draws: None, [matching], run.generator)
    sizes = {
        role: {key: p.shape for key, p in module.named_parameters()}
        for role, module in method.roles.items()
    }
    assert set(sizes) == {"student", "auxiliary"}
    for shapes in sizes.values():
        assert shapes == {key: p.shape for key, p in teacher.named_parameters()}
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in auxiliary.parameters())
    still = {id(p) for p in student.embedding_parameters()}
    assert all(p.requires_grad != (id(p) in still) for p in student.parameters())
    with torch.device("meta"):
        heads = discriminator_heads(run, teacher)
        features = [torch.empty(2, positions, width)] * 6
        condition = torch.zeros(2, dtype=torch.int64)
        assert heads(features, condition).shape == (2, 2)


@pytest.mark.parametrize("bits", [10, 12, 16, 18])
def test_maskbit_of_other_bits(bits: int) -> None:
    teacher, tokenizer = published_models("maskbit", bits)
    assert teacher.vocabulary == 2 ** (bits // 2) == tokenizer.codebook.shape[-2]
    assert teacher.token_shape == tokenizer.token_shape


@pytest.mark.parametrize("name", RECIPES)
def test_the_estimate(name: str) -> None:
    """fp32: three networks, an average, two moments for all that is trained, one gradient."""
    teacher, tokenizer = published_models(name)
    whole = PARAMETERS[name][0]
    distilled = estimate(recipe(name, "distillation"), teacher, tokenizer)
    frozen = sum(p.numel() for p in teacher.embedding_parameters())
    expected = BYTES * (4 * whole + 2 * (whole - frozen) + 2 * whole + whole)
    assert distilled.total == expected
    assert distilled.parameters == dict.fromkeys(("teacher", "student", "auxiliary"), whole)
    rewarded = estimate(recipe(name, "reward"), teacher, tokenizer)
    assert rewarded.total - distilled.total == BYTES * PARAMETERS[name][1]
    adversarial = estimate(recipe(name, "adversarial"), teacher, tokenizer)
    assert adversarial.total - distilled.total == 3 * BYTES * adversarial.parameters["heads"]
    last = distilled.lines()[-1]
    assert last.startswith("together")
    assert last.endswith(f"{expected / GIB:.2f} GiB")


def test_the_estimate_is_what_a_trainer_holds(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("maskgit")
    run = tiny_run("maskgit", "adversarial", write_files(root / "files", "maskgit"))
    trainer = build_trainer(run, root / "run")
    trainer.run()
    modules = trainer.method.roles
    said = estimate(run, tiny_model("maskgit"))
    held = {role: BYTES * sum(p.numel() for p in m.parameters()) for role, m in modules.items()}
    assert {role: said.weights[role] for role in held} == held
    average = trainer.averages["student"].module
    assert said.weights["student's average"] == BYTES * sum(p.numel() for p in average.parameters())
    for role, optimizer in trainer.optimizers.items():
        moments = [
            state[key].numel()
            for state in optimizer.optimizer.state.values()
            for key in ("exp_avg", "exp_avg_sq")
        ]
        assert said.adam[role] == BYTES * sum(moments)
    trained = [sum(p.numel() for p in o.parameters) for o in trainer.optimizers.values()]
    assert said.gradients == BYTES * max(trained)


def test_nothing_is_frozen_where_the_run_does_not_ask_for_it() -> None:
    teacher, _ = published_models("maskgit")
    run = recipe("maskgit", "distillation")
    free = replace(run, generator=replace(run.generator, freeze_embeddings=False))
    assert math.isclose(
        estimate(free, teacher).total - estimate(run, teacher).total,
        2 * BYTES * sum(p.numel() for p in teacher.embedding_parameters()),
    )
