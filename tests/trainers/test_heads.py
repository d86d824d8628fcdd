"""Discriminator heads: scores a token and a sample, the class projection, the losses."""

from __future__ import annotations

import pytest
import torch
from support.training import heads, transformer
from torch import Tensor
from torch.nn import functional

from softdimo_fast._config import ConfigError
from softdimo_fast.trainers import HeadsConfig
from softdimo_fast.trainers.heads import discriminator_loss, generator_loss


def features(count: int = 3) -> list[Tensor]:
    return [torch.randn(count, 5, 16), torch.randn(count, 5, 16)]


def test_which_layers() -> None:
    assert HeadsConfig().layers_of(3) == (0, 1, 2)
    assert HeadsConfig().layers_of(24) == (0, 5, 9, 14, 18, 23)
    assert HeadsConfig(layers=(1, 4)).layers_of(5) == (1, 4)
    with pytest.raises(ConfigError, match="layers: must be numbers from 0 to 3"):
        HeadsConfig(layers=(1, 4)).layers_of(4)


@pytest.mark.parametrize(
    ("token_heads", "global_head"), [(True, True), (True, False), (False, True)]
)
def test_one_score_of_each_kind(token_heads: bool, global_head: bool) -> None:
    module = heads(transformer(), token_heads=token_heads, global_head=global_head)
    assert module(features(), torch.tensor([0, 1, 1])).shape == (3, token_heads + global_head)


def test_token_heads_average_over_positions_and_layers() -> None:
    module, x = heads(transformer(), global_head=False), features()
    score = module(x, torch.tensor([0, 1, 1]))[:, 0]
    expected = torch.stack([h(f).mean((1, 2)) for h, f in zip(module.tokens, x, strict=True)]).mean(
        0
    )
    torch.testing.assert_close(score, expected)
    # Permuting positions changes nothing: these heads are blind to combinations.
    torch.testing.assert_close(score, module([f.flip(1) for f in x], torch.tensor([0, 1, 1]))[:, 0])


def test_the_global_head_sees_combinations_and_the_class() -> None:
    module, x = heads(transformer(), token_heads=False), features()
    zero, one = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64)
    score = module(x, zero)
    assert not torch.allclose(score, module([f.flip(1) for f in x], zero))
    assert not torch.allclose(score, module(x, one))
    squeezed = [s(f).flatten(1) for s, f in zip(module.squeeze, x, strict=True)]
    body = module.body(torch.cat(squeezed, 1))
    difference = body @ (module.projection.weight[1] - module.projection.weight[0]) / 8**0.5
    torch.testing.assert_close((module(x, one) - score)[:, 0], difference)
    blind = heads(transformer(), token_heads=False, class_projection=False)
    assert torch.equal(blind(x, zero), blind(x, one))


def test_losses() -> None:
    real, fake = torch.randn(4, 2), torch.randn(4, 2)
    non_saturating = -functional.logsigmoid(fake)
    torch.testing.assert_close(generator_loss(fake, "non_saturating"), non_saturating.mean(1))
    torch.testing.assert_close(generator_loss(fake, "hinge"), -fake.mean(1))
    logistic = -functional.logsigmoid(real) - (1 - fake.sigmoid()).log()
    torch.testing.assert_close(discriminator_loss(real, fake, "non_saturating"), logistic.mean(1))
    hinge = (1 - real).clamp(min=0) + (1 + fake).clamp(min=0)
    torch.testing.assert_close(discriminator_loss(real, fake, "hinge"), hinge.mean(1))
    # Where the discriminator is sure, the hinge no longer pushes.
    sure = torch.full((1, 1), 2.0)
    assert float(discriminator_loss(sure, -sure, "hinge")) == 0
