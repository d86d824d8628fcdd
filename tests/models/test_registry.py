"""Models are built from configs, described, and built again."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from support.checks import assert_same_bits
from support.published import SIZES
from support.training import classifier, images, tokenizer, transformer

from softdimo_fast._config import ConfigError
from softdimo_fast.models import registry
from softdimo_fast.models.classifier import ConvClassifierConfig
from softdimo_fast.models.registry import build, create, describe, rebuild
from softdimo_fast.models.transformer import TokenTransformerConfig

MODELS = {
    "token_transformer": transformer,
    "vector_quantizer": tokenizer,
    "mlp_classifier": classifier,
    "conv_classifier": lambda: create(ConvClassifierConfig(image_size=4, width=4)),
    **{family: partial(build, family, sizes) for family, sizes in SIZES.items()},
}


def test_every_family_is_tested() -> None:
    assert MODELS.keys() == registry.FAMILIES.keys()


@pytest.mark.parametrize("family", MODELS)
def test_round_trip_through_json(family: str) -> None:
    model = MODELS[family]()
    description = json.loads(json.dumps(describe(model)))
    assert description["family"] == family
    again = rebuild(description)
    assert type(again) is type(model)
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    for name, value in model.state_dict().items():
        assert_same_bits(value, again.state_dict()[name], name)


def test_a_rebuilt_model_computes_the_same() -> None:
    model = classifier()
    again = rebuild(describe(model))
    again.load_state_dict(model.state_dict())
    assert_same_bits(model(images(4)[0]), again(images(4)[0]))


def test_the_seed_alone_decides_the_weights() -> None:
    config = TokenTransformerConfig(vocabulary=8, length=4, conditions=2, width=16, depth=1)
    first = create(config, seed=4)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    second, third = create(config, seed=4), create(config, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert_same_bits(first.output.weight, second.output.weight)
    assert not torch.equal(first.output.weight, third.output.weight)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"family": "vq", "config": {}}, "family.*must be .*vector_quantizer"),
        ({"config": {}}, "family"),
        ("token_transformer", "family"),
        ({"family": "token_transformer", "config": {"vocabulary": 8}}, "length"),
        (
            {
                "family": "token_transformer",
                "config": {"vocabulary": 8, "length": 4, "conditions": 2, "widht": 8},
            },
            "widht.*width",
        ),
        ({"family": "vector_quantizer", "config": {"grid": 0}}, "grid.*>= 1.*got 0"),
    ],
)
def test_bad_descriptions(description: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rebuild(description)


def test_unknown_models() -> None:
    with pytest.raises(TypeError, match=r"token_transformer, .*got Linear"):
        describe(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"TokenTransformerConfig, .*got dict"):
        create({"vocabulary": 8})
