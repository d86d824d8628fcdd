"""The two classifiers: shapes, seeded weights, no hidden randomness, and that they can learn the digits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from softdimo_fast.data import load_digits, random_affine, sample_indices
from softdimo_fast.diffusion.draws import Draws
from softdimo_fast.models.classifier import (
    ConvClassifier,
    ConvClassifierConfig,
    MlpClassifier,
    MlpClassifierConfig,
)
from softdimo_fast.models.registry import create
from softdimo_fast.models.seeding import seeded

Classifier = ConvClassifier | MlpClassifier


def build(name: str, seed: int = 0) -> Classifier:
    if name == "conv":
        return create(ConvClassifierConfig(), seed=seed)  # type: ignore[no-any-return]
    return create(MlpClassifierConfig(), seed=seed)  # type: ignore[no-any-return]


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("name", "width"), [("conv", 32), ("mlp", 128)])
def test_features_and_logits(name: str, width: int) -> None:
    model, images = build(name), torch.randn(3, 1, 8, 8)
    features = model.features(images)
    assert features.shape == (3, width)
    # GELU is never below -0.17: these are values before the activation.
    assert bool((model.features(100 * images) < -0.2).any())
    assert model(images).shape == (3, 10)
    torch.testing.assert_close(model(images), model.head(functional.gelu(features)))


@pytest.mark.parametrize("name", ["conv", "mlp"])
def test_the_seed_alone_decides_the_weights(name: str) -> None:
    first = build(name)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert_same_weights(first, build(name))
    assert torch.equal(state, torch.get_rng_state())
    other = build(name, seed=1)
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize("name", ["conv", "mlp"])
def test_training_mode_draws_nothing(name: str) -> None:
    model, images = build(name).train(), torch.randn(4, 1, 8, 8)
    state = torch.get_rng_state()
    assert torch.equal(model(images), model.eval()(images))
    assert torch.equal(state, torch.get_rng_state())


def test_other_shapes() -> None:
    conv = ConvClassifier(
        ConvClassifierConfig(image_size=16, channels=3, num_classes=4, width=8, feature_dim=5),
    )
    assert conv.features(torch.randn(2, 3, 16, 16)).shape == (2, 5)
    assert conv(torch.randn(2, 3, 16, 16)).shape == (2, 4)
    mlp = MlpClassifier(MlpClassifierConfig(image_size=5, channels=2, num_classes=3, width=6))
    assert mlp(torch.randn(2, 2, 5, 5)).shape == (2, 3)
    assert mlp.features(torch.randn(0, 2, 5, 5)).shape == (0, 6)


def test_configs_are_frozen_and_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ConvClassifierConfig().width = 3  # type: ignore[misc]
    with pytest.raises(
        ValueError, match=r"ConvClassifierConfig\.width: must be a number >= 1, got 0"
    ):
        ConvClassifierConfig(width=0)
    with pytest.raises(ValueError, match=r"image_size: must be even, got 9"):
        ConvClassifierConfig(image_size=9)
    with pytest.raises(
        ValueError, match=r"MlpClassifierConfig\.channels: must be an integer, got 1\.5"
    ):
        MlpClassifierConfig(channels=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["conv", "mlp"])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 16, 16), (2, 64)])
def test_wrong_images_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must have shape \[B, 1, 8, 8\], got"):
        build(name)(torch.zeros(shape))


def test_seeded_restores_the_generator_after_an_error() -> None:
    state = torch.get_rng_state()

    def fail() -> None:
        with seeded(5):
            torch.rand(3)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.equal(state, torch.get_rng_state())


def test_seeded_keeps_the_meta_device_and_refuses_other_seeds() -> None:
    with torch.device("meta"):
        assert build("mlp").head.weight.is_meta
    for seed in (None, 1.0, True):
        with pytest.raises(TypeError, match="seed must be an int"), seeded(seed):  # type: ignore[arg-type]
            pass


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv", "mlp"])
def test_learns_the_digits_without_dropout(name: str) -> None:
    """Augmentation, input noise and label smoothing take its place; all draws are counter-based."""
    split, model, steps, batch = load_digits(), build(name), 800, 128
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        rows = sample_indices(0, step * batch, batch, len(split.train))
        draws = Draws.of(0, step, batch)
        images: Tensor = random_affine(split.train.images[rows], draws)
        images = images + 0.05 * draws.normal("noise", *images.shape[1:])
        loss = functional.cross_entropy(
            model(images), split.train.digits[rows], label_smoothing=0.05
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        predicted = model(split.held_out.images).argmax(1)
    assert float((predicted == split.held_out.digits).float().mean()) >= 0.985
