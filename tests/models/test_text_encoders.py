"""Text encoders: which layer, which norm, which padding; and what a missing package or file says."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checks import assert_same_bits
from support.clip import (
    CONTEXT,
    LAYERS,
    POOLED,
    WIDTH,
    ByteTower,
    open_clip_model,
    transformers_clip,
    write_byte_tokenizer,
    write_published_tokenizer,
)
from torch import Tensor
from torch.nn import functional as F

from softdimo_fast.models.clip_files import local_path
from softdimo_fast.models.files import ModelFileError
from softdimo_fast.models.text_conditions import NO_PROMPT, MeissonicCondition, TextCondition
from softdimo_fast.models.text_encoders import (
    NEGATIVE_PROMPT,
    ClipText,
    MaskGenTextEncoder,
    MeissonicTextEncoder,
)

PROMPTS = ["a cat", "two dogs on a hill", "x"]


# ---------------------------------------------------------------------------------------------------
# conditions


def test_maskgen_condition() -> None:
    tower = ByteTower()
    condition = MaskGenTextEncoder(tower, score=5.0)(PROMPTS)
    assert isinstance(condition, TextCondition)
    found, null = tower(PROMPTS), tower([""])
    assert_same_bits(condition.text, found.penultimate)
    assert_same_bits(condition.pooled, found.pooled)
    assert_same_bits(condition.guidance, found.last)
    assert_same_bits(condition.null_text, null.penultimate.expand(3, -1, -1))
    assert_same_bits(condition.null_pooled, null.pooled.expand(3, -1))
    assert condition.score.tolist() == [5.0] * 3
    assert condition.prompt.tolist() == [NO_PROMPT] * 3
    assert MaskGenTextEncoder(tower, guidance=False)(PROMPTS).guidance.shape == (3, 0, WIDTH)


def test_meissonic_condition() -> None:
    tower = ByteTower()
    encoder = MeissonicTextEncoder(tower)
    assert tower.calls == [[NEGATIVE_PROMPT]]
    condition = encoder(PROMPTS)
    assert isinstance(condition, MeissonicCondition)
    found, null = tower(PROMPTS), tower([NEGATIVE_PROMPT])
    assert_same_bits(condition.text, found.penultimate)
    assert_same_bits(condition.pooled, found.pooled)
    assert_same_bits(condition.null_text, null.penultimate.expand(3, -1, -1))
    assert condition.micro.tolist() == [[1024, 1024, 0, 0, 6]] * 3
    assert condition.time.tolist() == [0] * 3
    other = MeissonicTextEncoder(tower, negative_prompt="ugly", micro=(512, 512, 0, 0, 7), time=3)(
        ["a"]
    )
    assert_same_bits(other.null_pooled, tower(["ugly"]).pooled)
    assert (other.micro[0, 4], other.time[0]) == (7, 3)


def test_towers_are_frozen() -> None:
    encoder = MaskGenTextEncoder(ByteTower()).train()
    assert not encoder.tower.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(tensor.requires_grad for tensor in encoder(["a"]))
    assert encoder.state_dict().keys() == {"tower.model.weight"}


# ---------------------------------------------------------------------------------------------------
# transformers


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, Any]:
    model = transformers_clip(tmp_path / "clip")
    return write_byte_tokenizer(tmp_path / "clip"), model


def byte_ids(tower: ClipText, prompts: list[str]) -> Tensor:
    ids = tower.tokenize(prompts)
    assert ids.shape == (len(prompts), CONTEXT)
    assert ids.dtype == torch.int64
    return ids


def reference(model: Any, ids: Tensor) -> list[Tensor]:
    """CLIP's text tower written out: penultimate rows, normed last rows, projected end token."""
    text = model.text_model
    rows = text.embeddings.token_embedding(ids)
    rows = rows + text.embeddings.position_embedding.weight[: ids.shape[1]]
    penultimate = rows
    for number, layer in enumerate(text.encoder.layers):
        penultimate = rows
        normed, attention = layer.layer_norm1(rows), layer.self_attn
        q, k, v = (
            project(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        rows = rows + attention.out_proj(mixed.transpose(1, 2).flatten(2))
        hidden = layer.mlp.fc1(layer.layer_norm2(rows))
        rows = rows + layer.mlp.fc2(hidden * torch.sigmoid(1.702 * hidden))
        assert number < LAYERS
    last = text.final_layer_norm(rows)
    end = last[torch.arange(len(ids)), ids.argmax(1)]
    return [penultimate, last, model.text_projection(end)]


@pytest.mark.parametrize("pad", [None, 0])
def test_transformers_layers_and_norms(folder: tuple[Path, Any], pad: int | None) -> None:
    path, model = folder
    tower = ClipText.load(path, pad=pad)
    ids = byte_ids(tower, [*PROMPTS, "a text that is longer than the context"])
    assert ids[:, 0].tolist() == [512] * 4
    assert ids[0].tolist()[5:] == [513] + [513 if pad is None else pad] * 6  # "a cat" has 4 letters
    assert ids[3, -1] == 513
    with torch.no_grad():
        expected = reference(model, ids)
    found = tower.features(ids)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert found.pooled.shape == (4, POOLED)
    # The published samplers' choice of layer is not the last one.
    assert not torch.allclose(found.penultimate, found.last, atol=1e-2)


def test_encoders_from_a_transformers_folder(folder: tuple[Path, Any], tmp_path: Path) -> None:
    path, _ = folder
    maskgen = MaskGenTextEncoder.load(path)
    assert_same_bits(maskgen(PROMPTS).text, ClipText.load(path, pad=0)(PROMPTS).penultimate)
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    path.rename(pipeline / "text_encoder")
    write_byte_tokenizer(pipeline / "tokenizer")
    for name in ("vocab.json", "merges.txt"):
        (pipeline / "text_encoder" / name).unlink()
    meissonic = MeissonicTextEncoder.load(pipeline, negative_prompt="ugly")
    assert meissonic(PROMPTS).text.shape == (3, CONTEXT, WIDTH)
    other = MeissonicTextEncoder.load(
        pipeline / "text_encoder", tokenizer=pipeline / "tokenizer", negative_prompt="ugly"
    )
    assert_same_bits(other(PROMPTS).text, meissonic(PROMPTS).text)


def test_weights_that_are_missing(folder: tuple[Path, Any]) -> None:
    from safetensors.torch import load_file, save_file

    path, _ = folder
    tensors = load_file(path / "model.safetensors")
    key = "text_model.encoder.layers.1.mlp.fc1.weight"
    del tensors[key]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFileError, match=r"missing \['text_model.encoder.layers.1.mlp.fc1"):
        ClipText.load(path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json", "merges.txt"])
def test_files_that_are_missing(folder: tuple[Path, Any], name: str) -> None:
    path, _ = folder
    (path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        ClipText.load(path)


# ---------------------------------------------------------------------------------------------------
# open_clip


def test_open_clip_layers_and_norms(tmp_path: Path) -> None:
    model = open_clip_model(tmp_path / "clip")
    tower = ClipText.load(tmp_path / "clip")
    ids = byte_ids(tower, PROMPTS)
    assert ids[2].tolist() == [49406, 343, 49407] + [0] * (CONTEXT - 3)
    with torch.no_grad():
        rows = model.token_embedding(ids) + model.positional_embedding
        last = model.ln_final(model.transformer(rows, attn_mask=model.attn_mask))
        pooled = model.encode_text(ids)
        for block in model.transformer.resblocks[:-1]:
            rows = block(rows, attn_mask=model.attn_mask)
    for a, b in zip(tower.features(ids), (rows, last, pooled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_both_libraries_agree(tmp_path: Path) -> None:
    """The same weights and words through open_clip and transformers: MaskGen's published path and ours."""
    original = open_clip_model(tmp_path / "open_clip")
    copy = transformers_clip(tmp_path / "transformers", vocabulary=49408)
    state = {
        "embeddings.token_embedding.weight": original.token_embedding.weight,
        "embeddings.position_embedding.weight": original.positional_embedding,
        "final_layer_norm.weight": original.ln_final.weight,
        "final_layer_norm.bias": original.ln_final.bias,
    }
    for i, block in enumerate(original.transformer.resblocks):
        parts: dict[str, Any] = {
            "layer_norm1": block.ln_1, "layer_norm2": block.ln_2, "mlp.fc1": block.mlp.c_fc,
            "mlp.fc2": block.mlp.c_proj, "self_attn.out_proj": block.attn.out_proj,
        }  # fmt: skip
        for name, part in parts.items():
            for kind in ("weight", "bias"):
                state[f"encoder.layers.{i}.{name}.{kind}"] = getattr(part, kind)
        for kind in ("weight", "bias"):
            for name, rows in zip(
                "qkv", getattr(block.attn, f"in_proj_{kind}").chunk(3), strict=True
            ):
                state[f"encoder.layers.{i}.self_attn.{name}_proj.{kind}"] = rows
    copy.text_model.load_state_dict(state)
    copy.text_projection.weight.data = original.text_projection.data.T.contiguous()
    copy.save_pretrained(tmp_path / "transformers")
    write_published_tokenizer(tmp_path / "transformers")
    ours = MaskGenTextEncoder.load(tmp_path / "transformers")
    published = MaskGenTextEncoder.load(tmp_path / "open_clip")
    words = [
        *PROMPTS, "A Lighthouse,  at night!", "naïve café", "it's 1024 pixels",
        "a sentence of many words which the context of the tower cannot hold",
    ]  # fmt: skip
    assert torch.equal(ours.tower.tokenize(words), published.tower.tokenize(words))
    for a, b in zip(ours(words), published(words), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    gelu, published_gelu = (
        MaskGenTextEncoder.load(tmp_path / name, quick_gelu=False)
        for name in ("transformers", "open_clip")
    )
    assert (gelu(words).text - ours(words).text).abs().max() > 1e-3
    for a, b in zip(gelu(words), published_gelu(words), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_open_clip_weights_of_another_architecture(tmp_path: Path) -> None:
    open_clip_model(tmp_path)
    config = tmp_path / "open_clip_config.json"
    config.write_text(config.read_text().replace('"layers": 3', '"layers": 2'))
    with pytest.raises(ModelFileError, match="does not fit its architecture"):
        ClipText.load(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"one of open_clip_model\.safetensors"):
        ClipText.load(tmp_path)


# ---------------------------------------------------------------------------------------------------
# without a package, without a file


@pytest.mark.parametrize(
    ("library", "marker"),
    [("transformers", "config.json"), ("open_clip", "open_clip_config.json")],
)
def test_a_missing_package_names_the_extra(
    tmp_path: Path, library: str, marker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / marker).write_text("{}")
    with pytest.raises(ImportError, match=rf"need {library}.*softdimo-fast\[rewards\]"):
        MaskGenTextEncoder.load(tmp_path)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file or folder /nowhere/clip"):
        MaskGenTextEncoder.load("/nowhere/clip")
    with pytest.raises(
        FileNotFoundError, match=r"config\.json \(transformers\) or open_clip_config"
    ):
        MeissonicTextEncoder.load(tmp_path)


def test_a_hub_id_without_the_hub_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"softdimo-fast\[hub\]"):
        MaskGenTextEncoder.load("owner/name")


def test_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is asked for what is no path, and at the named commit."""
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"]))
        if name == "owner/none":
            raise RuntimeError("404")
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=download))
    with pytest.raises(FileNotFoundError, match="owner/none, and the hub does not give it: 404"):
        MaskGenTextEncoder.load("owner/none")
    assert local_path("owner/name", "abc") == tmp_path
    assert asked == [("owner/none", None), ("owner/name", "abc")]
    monkeypatch.chdir(tmp_path.parent)
    assert local_path(tmp_path.name) == Path(tmp_path.name)  # a path that exists is no hub id
    assert len(asked) == 2
