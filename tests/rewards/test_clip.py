"""CLIP's rewards: what the image tower sees, which prompt an image is asked about, and real models, tiny."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checks import assert_same_bits
from support.clip import (
    CONTEXT,
    IMAGE,
    POOLED,
    open_clip_model,
    transformers_clip,
    write_byte_tokenizer,
)
from torch import Tensor, nn
from torch.nn import functional as F

from softdimo_fast.models.files import ModelFileError
from softdimo_fast.models.text_conditions import TextCondition
from softdimo_fast.rewards import (
    ClipReward,
    HpsReward,
    ImageRewardReward,
    PickScoreReward,
    reno_rewards,
)
from softdimo_fast.rewards.clip import RENO_OFFSETS, RENO_WEIGHTS, ClipTowers
from softdimo_fast.rewards.prompted import CLIP_MEAN, CLIP_STD, clip_pixels

PROMPTS = ["a cat", "two dogs on a hill", "x", "the sea"]
CLASSES = [ClipReward, PickScoreReward, HpsReward]


def images(batch: int = 3, height: int = 40, width: int = 48, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 1.8 * torch.rand(batch, 3, height, width, generator=generator, **options) - 0.9


class TinyTowers(ClipTowers):
    """Towers of the tests' own: a matrix each."""

    size = 16

    def __init__(self) -> None:
        model = nn.ParameterDict({
            "image": torch.randn(3 * 16 * 16, 8, generator=torch.Generator().manual_seed(0)),
            "text": torch.randn(256, 8, generator=torch.Generator().manual_seed(1)),
            "logit_scale": torch.tensor(4.0),
        })  # fmt: skip
        super().__init__(model, self._bytes)
        self.calls: list[list[str]] = []

    def _bytes(self, prompts: Sequence[str]) -> Tensor:
        self.calls.append(list(prompts))
        return torch.tensor([[*p.encode()[:CONTEXT].ljust(CONTEXT, b"\0")] for p in prompts])

    def images(self, pixels: Tensor) -> Tensor:
        model: Any = self.model
        return pixels.flatten(1).to(model["image"].dtype) @ model["image"]

    def ids(self, ids: Tensor) -> Tensor:
        model: Any = self.model
        return F.embedding(ids, model["text"]).sum(1)


# ---------------------------------------------------------------------------------------------------
# what the image tower sees


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(40, 48, 16), (256, 256, 224), (33, 17, 24), (16, 16, 16), (50, 16, 16)],
)
def test_pixels_are_renos(height: int, width: int, size: int) -> None:
    given = images(2, height, width)
    short = min(height, width)
    resized = (int(size * height / short), int(size * width / short))  # torchvision's Resize
    # In float64: in float32 the filter's positions are rounded.
    expected = F.interpolate((given.double() + 1) / 2, resized, mode="bicubic", antialias=True)
    top, left = (round((n - size) / 2) for n in resized)  # torchvision's CenterCrop
    expected = expected[:, :, top : top + size, left : left + size]
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    found = clip_pixels(given, size)
    assert found.shape == (2, 3, size, size)
    torch.testing.assert_close(found, ((expected - mean) / std).float(), rtol=1e-5, atol=1e-5)


def test_pixels_gradient() -> None:
    given = images(1, 9, 12, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: clip_pixels(x, 6), (given,))


def test_pixels_beyond_the_range_are_those_at_its_end() -> None:
    given = torch.tensor([-1.5, -1.0, 1.0, 3.0]).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    found = clip_pixels(given, 8)
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[2], found[3])
    assert clip_pixels(given.bfloat16(), 8).dtype == torch.float32


def test_images_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"must have shape \[B, 3, h, w\], got \[2, 1, 8, 8\]"):
        clip_pixels(torch.zeros(2, 1, 8, 8), 8)
    with pytest.raises(TypeError, match="must be floating point"):
        clip_pixels(torch.zeros(2, 3, 8, 8).long(), 8)


# ---------------------------------------------------------------------------------------------------
# values


@pytest.mark.parametrize("kind", CLASSES)
def test_value_and_gradient(kind: Any) -> None:
    towers = TinyTowers()
    reward = kind(towers, PROMPTS)
    given = images().requires_grad_()
    numbers = torch.tensor([2, 0, 2])
    value = reward(given, numbers)
    words = towers.prompts([PROMPTS[n] for n in numbers])
    cosine = F.cosine_similarity(towers.images(clip_pixels(given, 16)), words)
    scale = 1.0 if kind is HpsReward else torch.tensor(4.0).exp()
    torch.testing.assert_close(value, scale * cosine)
    assert value.shape == (3,)
    value[1].backward()
    assert given.grad is not None
    assert given.grad[1].abs().sum() > 0
    assert not given.grad[[0, 2]].any()  # row b depends on image b alone
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_the_prompt_travels_in_the_condition() -> None:
    towers = TinyTowers()
    reward = ClipReward(towers, PROMPTS)
    numbers = torch.tensor([3, 1, 0])
    condition = TextCondition.of(torch.zeros(3, 4, 5), torch.zeros(3, 5), prompt=numbers)
    assert_same_bits(reward(images(), condition), reward(images(), numbers))
    with pytest.raises(ValueError, match="there is no prompt number -1"):
        reward(images(), TextCondition.of(torch.zeros(3, 4, 5), torch.zeros(3, 5)))


def test_prompts_are_encoded_once() -> None:
    towers = TinyTowers()
    reward = ClipReward(towers, PROMPTS, chunk=2)
    first = reward(images(), torch.tensor([1, 0, 1]))
    calls = len(towers.calls)
    assert towers.calls == [["two dogs on a hill", "a cat"]]
    assert_same_bits(reward(images(), torch.tensor([1, 0, 1])), first)
    assert len(towers.calls) == calls


def test_all_prompts_encoded_beforehand() -> None:
    towers, numbers = TinyTowers(), torch.tensor([1, 0, 3])
    reward = HpsReward(towers, PROMPTS, chunk=3, capacity=1)
    before = reward(images(), numbers)
    reward.encode_prompts()
    calls = len(towers.calls)
    assert_same_bits(reward(images(), numbers), before)
    assert len(towers.calls) == calls
    for number in (-1, 4):
        with pytest.raises(ValueError, match=f"no prompt number {number}: there are 4"):
            reward(images(), torch.tensor([0, number, 1]))


@pytest.mark.parametrize(
    ("condition", "error", "message"),
    [
        (torch.zeros(3), TypeError, r"must be int64 numbers \[B\].*got torch.float32 \[3\]"),
        (torch.zeros(3, 1).long(), TypeError, r"got torch.int64 \[3, 1\]"),
        (None, TypeError, "got NoneType"),
        (
            torch.zeros(2).long(),
            ValueError,
            "condition must have 3 prompts, one for each image, got 2",
        ),
        (torch.tensor([0, 4, 0]), ValueError, "there is no prompt number 4: there are 4"),
    ],
)
def test_conditions_that_are_none(condition: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ClipReward(TinyTowers(), PROMPTS)(images(), condition)


def test_training_mode_does_not_reach_the_model() -> None:
    reward = ClipReward(TinyTowers(), PROMPTS).train()
    assert not any(module.training for module in reward.modules())


def test_renos_sum() -> None:
    """Weight times (offset - score) is ReNO's loss; its gradient is that of minus our sum."""
    towers = TinyTowers()
    rewards = {"clip": ClipReward(towers, PROMPTS), "hps": HpsReward(towers, PROMPTS)}
    total, numbers = reno_rewards(rewards), torch.tensor([0, 1, 2])
    assert total.weights == {"clip": 0.01, "hps": 5.0}
    assert RENO_WEIGHTS.keys() == RENO_OFFSETS.keys()
    parts = total.parts(images(), numbers)
    loss = sum(RENO_WEIGHTS[name] * (RENO_OFFSETS[name] - parts[name]) for name in parts)
    torch.testing.assert_close(0.01 * 100 + 5.0 * 1 - loss, total(images(), numbers))
    with pytest.raises(
        ValueError, match="names must be of clip, pick_score, hps, image_reward, got CLIP"
    ):
        reno_rewards({"CLIP": rewards["clip"]})


# ---------------------------------------------------------------------------------------------------
# real models, tiny


@pytest.mark.parametrize("kind", [ClipReward, PickScoreReward])
def test_transformers_model(tmp_path: Path, kind: Any) -> None:
    model = transformers_clip(tmp_path)
    write_byte_tokenizer(tmp_path)
    reward = kind.load(tmp_path, PROMPTS)
    given, numbers = images().requires_grad_(), torch.tensor([1, 3, 0])
    ids = reward.towers.tokenize([PROMPTS[n] for n in numbers])
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=clip_pixels(given, IMAGE)).logits_per_image
    value = reward(given, numbers)
    torch.testing.assert_close(value.detach(), logits.diagonal(), rtol=1e-4, atol=1e-4)
    value.sum().backward()
    assert given.grad is not None
    assert given.grad.flatten(1).abs().sum(1).gt(0).all()
    assert reward.towers.model.logit_scale.grad is None


def test_open_clip_model_from_hps_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    model = open_clip_model(tmp_path / "clip")
    import open_clip

    description = json.loads((tmp_path / "clip" / "open_clip_config.json").read_text())
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: description["model_cfg"])
    file = tmp_path / "HPS.pt"
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, file)
    reward = HpsReward.load(file, PROMPTS)
    given, numbers = images().requires_grad_(), torch.tensor([1, 3, 0])
    texts = open_clip.SimpleTokenizer(context_length=CONTEXT)([PROMPTS[n] for n in numbers])
    with torch.no_grad():
        seen = model.encode_image(clip_pixels(given, IMAGE), normalize=True)
        expected = (seen * model.encode_text(texts, normalize=True)).sum(-1)
    value = reward(given, numbers)
    assert reward.towers.size == IMAGE
    torch.testing.assert_close(value.detach(), expected, rtol=1e-5, atol=1e-6)
    value.sum().backward()
    assert given.grad is not None
    assert given.grad.flatten(1).abs().sum(1).gt(0).all()
    broken = model.state_dict()
    del broken["visual.proj"]
    torch.save({"state_dict": broken}, file)
    with pytest.raises(ModelFileError, match=r"Missing key.*visual\.proj"):
        HpsReward.load(file, PROMPTS)


def test_both_libraries_are_named_when_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("transformers", "open_clip"):
        monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "HPS.pt").write_bytes(b"")
    for load, library in (
        (lambda: PickScoreReward.load(tmp_path, PROMPTS), "transformers"),
        (lambda: HpsReward.load(tmp_path / "HPS.pt", PROMPTS), "open_clip"),
    ):
        with pytest.raises(ImportError, match=rf"need {library}.*softdimo-fast\[rewards\]"):
            load()
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder /nowhere/HPS\.pt"):
        HpsReward.load("/nowhere/HPS.pt", PROMPTS)


# ---------------------------------------------------------------------------------------------------
# ImageReward


class _ImageReward(nn.Module):
    """The interface of the package's model: BLIP's two towers, an MLP and two numbers."""

    mean, std = 0.16717362830052426, 1.0333394966054072

    def __init__(self) -> None:
        super().__init__()
        self.blip = nn.Module()
        self.blip.visual_encoder = nn.Sequential(nn.Conv2d(3, 6, 56, 56), nn.Flatten(2))
        self.blip.words = nn.Embedding(256, 16)
        blip: Any = self.blip
        blip.tokenizer, blip.text_encoder = self._tokenizer, self._text_encoder
        self.mlp = nn.Linear(16, 1)

    def _tokenizer(self, prompts: list[str], **options: Any) -> Any:
        assert options == {
            "padding": "max_length", "truncation": True, "max_length": 35, "return_tensors": "pt",
        }  # fmt: skip
        ids = torch.tensor([[*p.encode()[:35].ljust(35, b"\0")] for p in prompts])
        return SimpleNamespace(input_ids=ids, attention_mask=(ids > 0).long())

    def _text_encoder(self, ids: Tensor, **options: Any) -> Any:
        blip: Any = self.blip
        seen, mask = options["encoder_hidden_states"], options["encoder_attention_mask"]
        assert mask.shape == seen.shape[:2]
        words = (blip.words(ids) * options["attention_mask"][..., None]).sum(1)
        rows = torch.tanh(words * (seen * mask[..., None]).sum(1))
        return SimpleNamespace(last_hidden_state=torch.stack([rows, rows + 1], dim=1))


def test_image_reward() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _ImageReward()
    reward = ImageRewardReward(model, PROMPTS)
    given, numbers = images(height=64, width=80).requires_grad_(), torch.tensor([3, 0, 1])
    value = reward(given, numbers)
    tokens = model._tokenizer(
        [PROMPTS[n] for n in numbers], padding="max_length", truncation=True, max_length=35,
        return_tensors="pt",
    )  # fmt: skip
    seen = model.blip.visual_encoder(clip_pixels(given, 224))
    text = model._text_encoder(
        tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen,
        encoder_attention_mask=torch.ones(seen.shape[:2]),
    )  # fmt: skip
    expected = (model.mlp(text.last_hidden_state[:, 0]) - model.mean) / model.std
    torch.testing.assert_close(value, expected[:, 0])
    value[0].backward()
    assert given.grad is not None
    assert given.grad[0].any()
    assert not given.grad[1:].any()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(TypeError, match="Linear has no blip, mlp, mean, std"):
        ImageRewardReward(nn.Linear(2, 2), PROMPTS)


def test_embeddings_of_the_tiny_models_have_their_width(tmp_path: Path) -> None:
    transformers_clip(tmp_path)
    write_byte_tokenizer(tmp_path)
    towers = ClipReward.load(tmp_path, PROMPTS).towers
    assert towers.prompts(["a"]).shape == (1, POOLED)
    assert (towers.size, float(towers.scale) > 1) == (IMAGE, True)
