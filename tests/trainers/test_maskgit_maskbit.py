"""Small MaskGIT and MaskBit models train with every method at once, frozen parts stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.training import FAST, generator, trainer
from torch import Tensor

from softdimo_fast.data.source import TokenSource, UniformConditions
from softdimo_fast.diffusion import Draws
from softdimo_fast.models.maskbit import MaskBitGenerator, MaskBitGeneratorConfig
from softdimo_fast.models.maskbit_tokenizer import (
    MaskBitTokenizer,
    MaskBitTokenizerConfig,
    MaskBitTokenizerSizes,
)
from softdimo_fast.models.maskgit import MaskGitConfig, MaskGitTransformer
from softdimo_fast.models.seeding import seeded
from softdimo_fast.models.vqgan import VqGan, VqGanConfig, VqGanSizes
from softdimo_fast.trainers import (
    Adversarial,
    AdversarialConfig,
    DiscriminatorHeads,
    DistillationConfig,
    DistributionMatching,
    HeadsConfig,
    RewardConfig,
    RewardObjective,
    TeacherConfig,
    TeacherMethod,
)

FAMILIES = ("maskgit", "maskbit")
CLASSES = 3
SIZES: dict[str, Any] = {
    "img_size": 32, "hidden_dim": 16, "depth": 2, "heads": 2, "mlp_dim": 16, "nclass": CLASSES,
}  # fmt: skip


def transformer(family: str, seed: int) -> Any:
    """With weights far from zero: a fresh one tells nothing apart."""
    with seeded(seed):
        if family == "maskgit":
            model: Any = MaskGitTransformer(MaskGitConfig(codebook_size=8, **SIZES))
        else:
            model = MaskBitGenerator(MaskBitGeneratorConfig(codebook_size=64, **SIZES))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokenizer(family: str) -> Any:
    """2 x 2 positions for 4 x 4 pixels."""
    with seeded(5):
        if family == "maskgit":
            sizes = VqGanSizes(
                z_channels=4, resolution=4, ch=32, ch_mult=(1, 1), num_res_blocks=1,
                attn_resolutions=(),
            )  # fmt: skip
            return VqGan(VqGanConfig(ddconfig=sizes, n_embed=8, embed_dim=4))
        bits = MaskBitTokenizerSizes(
            token_size=6, hidden_channels=32, channel_mult=(1, 1), num_resolutions=2,
            num_res_blocks=1,
        )  # fmt: skip
        return MaskBitTokenizer(MaskBitTokenizerConfig(config=bits, img_size=4))


def brightness(images: Tensor, condition: Tensor) -> Tensor:
    return images.flatten(1).mean(1)


def tokens(family: str) -> TokenSource:
    images = Draws.of(0, 0, 16).uniform("images", 3, 4, 4) * 2 - 1
    with torch.no_grad():
        coded = tokenizer(family).encode(images)
    return TokenSource(coded, torch.arange(16) % CLASSES, 4)


def adversarial(family: str, teacher: Any) -> Adversarial:
    config = HeadsConfig(hidden=8, squeeze=4, global_hidden=(8, 8))
    with seeded(7):
        heads = DiscriminatorHeads(config, width=16, positions=5, layers=2, conditions=CLASSES)
    options = AdversarialConfig(heads=config, heads_optimizer=FAST)
    return Adversarial(teacher, heads, tokens(family), options)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_distillation_with_a_discriminator_and_a_reward(family: str, checkpointed: bool) -> None:
    teacher, auxiliary, student = (transformer(family, seed) for seed in (0, 1, 2))
    for model in (teacher, auxiliary, student):
        model.checkpoint_blocks = checkpointed
    method = generator(
        DistributionMatching(
            teacher, auxiliary, DistillationConfig(guidance_scale=2.0, auxiliary_optimizer=FAST)
        ),
        adversarial(family, teacher),
        RewardObjective(tokenizer(family), brightness, RewardConfig()),
        student=student,
        conditions=UniformConditions(CLASSES),
    )
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    reference = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    trainer(method, steps=2, batch_size=4, log_every=2, checkpoint_every=100).run()
    frozen = {id(parameter) for parameter in student.embedding_parameters()}
    for name, parameter in student.named_parameters():
        moved = not torch.equal(parameter.detach(), before[name])
        # A head that is tied to a frozen table does not move either.
        assert moved == (id(parameter) not in frozen), name
        assert bool(parameter.isfinite().all()), name
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, reference[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_teacher(family: str) -> None:
    model = transformer(family, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    method = TeacherMethod(model, tokens(family), TeacherConfig(optimizer=FAST))
    trainer(method, steps=2, batch_size=4, log_every=2, checkpoint_every=100).run()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
