"""Parity data of the MaskGIT and MaskBit families, and our models built from what it says.

The data lies beside the repository where there is any, in ``shared``: small state dicts under the published
keys with what the published implementations compute from them, and the key lists of the full-size models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from softdimo_fast import _config
from softdimo_fast.models.maskbit import MaskBitGenerator, MaskBitGeneratorConfig
from softdimo_fast.models.maskbit_tokenizer import MaskBitTokenizer, MaskBitTokenizerConfig
from softdimo_fast.models.maskgit import MaskGitConfig, MaskGitTransformer
from softdimo_fast.models.vqgan import VqGan, VqGanConfig

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
FIXTURES, CHECKPOINTS = SHARED / "fixtures", SHARED / "design" / "checkpoints"

needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason="the parity fixtures are not beside the repository"
)
needs_key_lists = pytest.mark.skipif(
    not CHECKPOINTS.is_dir(), reason="the published key lists are not beside the repository"
)

FAMILIES: dict[str, tuple[Any, Any]] = {
    "MaskTransformer": (MaskGitTransformer, MaskGitConfig),
    "VQModel": (VqGan, VqGanConfig),
    "LFQBert": (MaskBitGenerator, MaskBitGeneratorConfig),
    "ConvVQModel": (MaskBitTokenizer, MaskBitTokenizerConfig),
}


class Fixture(NamedTuple):
    """One pair of files: what the JSON says, and the tensors by their names."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, prefix: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The tensors below a prefix, floating ones as ``dtype``."""
        found = {
            name.removeprefix(f"{prefix}/"): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{prefix}/")
        }
        return {n: t.to(dtype) if t.is_floating_point() else t for n, t in found.items()}


@lru_cache
def fixture(name: str) -> Fixture:
    facts = json.loads((FIXTURES / f"{name}.json").read_text())
    return Fixture(facts, load_file(FIXTURES / f"{name}.safetensors"))


def table(name: str) -> dict[str, Any]:
    """A fixture that is JSON alone."""
    content: dict[str, Any] = json.loads((FIXTURES / f"{name}.json").read_text())
    return content


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Our model of a fixture's constructor and state dict, loaded strictly."""
    data = fixture(name)
    module, config = FAMILIES[data.facts["class"]]
    model: nn.Module = module(_config.from_dict(config, data.facts["constructor"]))
    model.load_state_dict(data.part("sd"), strict=True)
    return model.to(dtype).eval().requires_grad_(False)


def error_and_bound(data: Fixture, name: str, value: Tensor) -> tuple[float, float]:
    """The largest difference from a floating output, and what the fixtures' authors allow."""
    expected = data.tensors[f"out/{name}"].double()
    assert value.shape == expected.shape, name
    noise = data.facts["fp32_vs_fp64_max_abs_diff"].get(name, 0.0)
    bound = 1e-6 * max(1.0, float(expected.abs().max())) + 10 * noise
    return float((value.detach().double() - expected).abs().max()), bound


def assert_parity(data: Fixture, outputs: Mapping[str, Tensor]) -> None:
    """Every output of the fixture, and no other; integers exactly."""
    names = {name.removeprefix("out/") for name in data.tensors if name.startswith("out/")}
    assert set(outputs) == names
    for name, value in outputs.items():
        expected = data.tensors[f"out/{name}"]
        if not expected.is_floating_point():
            assert torch.equal(value, expected), name
            continue
        error, bound = error_and_bound(data, name, value)
        assert error <= bound, f"{name}: {error:.3e} > {bound:.3e}"


def assert_key_list(model: nn.Module, name: str) -> None:
    """A full-size state dict loads strictly, and comes back: keys in order, shapes, dtypes."""
    listed = json.loads((CHECKPOINTS / f"{name}.json").read_text())
    published = {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, (shape, dtype) in listed.items()
    }
    model.load_state_dict(published, strict=True, assign=True)
    ours = model.state_dict()
    assert list(ours) == list(published)
    for key, (shape, dtype) in listed.items():
        assert list(ours[key].shape) == shape, key
        assert ours[key].dtype == getattr(torch, dtype), key
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(published | {"more": torch.empty(1, device="meta")}, strict=True)
    first = next(iter(published))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({k: v for k, v in published.items() if k != first}, strict=True)
