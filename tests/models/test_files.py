"""Model files: our folders, and published checkpoints in the forms they are published in."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.process import ROOT
from support.published import SIZES

from softdimo_fast._config import ConfigError
from softdimo_fast.models import (
    ModelFileError,
    build,
    describe,
    from_pretrained,
    save_pretrained,
    save_published,
)
from softdimo_fast.models.files import CONFIGURED, DESCRIPTION, LAYOUTS, WEIGHTS, sha256

FAMILIES = list(SIZES)


def assert_same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    assert describe(model) == describe(other)
    mine, theirs = model.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]), key


def published_state(family: str) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in build(family, SIZES[family]).state_dict().items()}


def write(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_every_published_family_is_covered() -> None:
    assert set(FAMILIES) == set(LAYOUTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_own_folder_round_trips_and_records_digests(family: str, tmp_path: Path) -> None:
    model = build(family, SIZES[family], seed=3)
    source = write(tmp_path / "published.bin", published_state(family))
    folder = save_pretrained(model, tmp_path / "ours", source=source)
    assert sorted(file.name for file in folder.iterdir()) == [DESCRIPTION, WEIGHTS]
    document = json.loads((folder / DESCRIPTION).read_text())
    assert document["family"] == family
    assert document["sha256"] == sha256(folder / WEIGHTS)
    assert document["source"] == {"file": "published.bin", "sha256": sha256(source)}
    again = from_pretrained(folder)
    assert not again.training
    assert_same(model, again)


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
@pytest.mark.parametrize("family", FAMILIES)
def test_published_form_round_trips_and_is_recognised(
    family: str, ending: str, tmp_path: Path
) -> None:
    model = build(family, SIZES[family], seed=3)
    path = save_published(model, tmp_path / f"published{ending}")
    assert_same(model, from_pretrained(path, sizes=SIZES[family]))


def test_maskgit_file_wraps_its_state_dict(tmp_path: Path) -> None:
    content = {
        "iter": 7, "global_epoch": 1, "model_state_dict": published_state("maskgit"),
        "optimizer_state_dict": {"state": {}},
    }  # fmt: skip
    path = write(tmp_path / "MaskGIT_ImageNet_256.pth", content)
    assert_same(from_pretrained(path, sizes=SIZES["maskgit"]), build("maskgit", SIZES["maskgit"]))


def test_a_plain_state_dict_of_maskgit_is_a_di_m_o_student(tmp_path: Path) -> None:
    path = write(tmp_path / "pytorch_model.bin", published_state("maskgit"))
    assert_same(from_pretrained(path, sizes=SIZES["maskgit"]), build("maskgit", SIZES["maskgit"]))


def test_vqgan_file_may_hold_its_losses_and_nothing_else(tmp_path: Path) -> None:
    state = published_state("maskgit_vqgan")
    losses = {"loss.perceptual_loss.lin0.weight": torch.ones(1), "loss.logvar": torch.zeros(())}
    path = write(tmp_path / "last.ckpt", {"epoch": 1, "state_dict": state | losses})
    sizes = SIZES["maskgit_vqgan"]
    assert_same(from_pretrained(path, sizes=sizes), build("maskgit_vqgan", sizes))
    write(path, {"state_dict": state | losses | {"extra.weight": torch.ones(1)}})
    with pytest.raises(ModelFileError, match=r"Unexpected key.*extra\.weight"):
        from_pretrained(path, sizes=sizes)


def test_maskbit_file_may_have_its_old_prefix(tmp_path: Path) -> None:
    old = {
        key.replace("input_proj.", "token_emb."): value
        for key, value in published_state("maskbit").items()
    }
    assert "token_emb.weight" in old
    path = write(tmp_path / "maskbit_generator_8bit.bin", old)
    assert_same(from_pretrained(path, sizes=SIZES["maskbit"]), build("maskbit", SIZES["maskbit"]))


def test_maskgen_forms_with_and_without_the_tied_head(tmp_path: Path) -> None:
    model = build("maskgen_vq", SIZES["maskgen_vq"], seed=3)
    tensors = save_published(model, tmp_path / "model.safetensors")
    pickled = save_published(model, tmp_path / "maskgen.bin")
    assert "lm_head.weight" not in load_file(tensors)
    both = torch.load(pickled, weights_only=True)
    assert torch.equal(both["lm_head.weight"], both["embeddings.weight"])
    for path in (tensors, pickled):
        assert_same(model, from_pretrained(path, sizes=SIZES["maskgen_vq"]))
    both["lm_head.weight"] = both["lm_head.weight"] + 1
    write(pickled, both)
    with pytest.raises(ModelFileError, match=r"lm_head\.weight must equal embeddings\.weight"):
        from_pretrained(pickled, sizes=SIZES["maskgen_vq"])


@pytest.mark.parametrize("family", ["meissonic", "tatitok_vq", "maskgen_vq"])
def test_sizes_come_from_the_config_beside_the_weights(family: str, tmp_path: Path) -> None:
    model = build(family, SIZES[family], seed=3)
    save_published(model, tmp_path / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "X", **SIZES[family]} if family == "meissonic" else SIZES[family]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(model, from_pretrained(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_back_brings_the_config_where_it_is_published(family: str, tmp_path: Path) -> None:
    model = build(family, SIZES[family], seed=3)
    for name in ("pickled", "tensors"):
        (tmp_path / name).mkdir()
    save_published(model, tmp_path / "pickled" / "model.bin")
    assert [file.name for file in (tmp_path / "pickled").iterdir()] == ["model.bin"]
    folder = save_published(model, tmp_path / "tensors" / "model.safetensors").parent
    assert (folder / "config.json").exists() == (family in CONFIGURED)
    if family in CONFIGURED:
        assert_same(model, from_pretrained(folder))
        (folder / "config.json").write_text("{}")
        save_published(model, folder / "again.safetensors")
        assert (folder / "config.json").read_text() == "{}"  # somebody's own


def test_loss_of_a_key_and_a_wrong_shape_are_listed(tmp_path: Path) -> None:
    state = published_state("maskgit")
    del state["pos_emb"]
    state["bias"] = state["bias"][:, 1:]
    path = write(tmp_path / "m.pth", {"model_state_dict": state})
    with pytest.raises(ModelFileError, match=r"m\.pth does not fit") as error:
        from_pretrained(path, sizes=SIZES["maskgit"])
    assert "pos_emb" in str(error.value)
    assert "size mismatch for bias" in str(error.value)


class Hostile:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch /tmp/softdimo-hostile",)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.bin", {"tok_emb.weight": Hostile()})
    with pytest.raises(ModelFileError, match="no file of plain tensors"):
        from_pretrained(path, family="maskgit")
    assert not Path("/tmp/softdimo-hostile").exists()


@pytest.mark.parametrize("cut", [0, 10, -10])
def test_truncated_files_are_told(cut: int, tmp_path: Path) -> None:
    for ending in (".safetensors", ".bin"):
        path = save_published(build("maskgit", SIZES["maskgit"]), tmp_path / f"m{ending}")
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(ModelFileError, match=path.name):
            from_pretrained(path, sizes=SIZES["maskgit"])


def test_a_flipped_bit_in_our_folder_is_found(tmp_path: Path) -> None:
    folder = save_pretrained(build("maskgit", SIZES["maskgit"]), tmp_path / "ours")
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-3] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(ModelFileError, match="damaged: its sha256"):
        from_pretrained(folder)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        from_pretrained(tmp_path)
    save_file({"a.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelFileError, match=r"of no family that is known .*a\.weight"):
        from_pretrained(tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="did you mean 'maskgit'"):
        from_pretrained(tmp_path / "x.safetensors", family="maskgti")
    save_file({"a.weight": torch.ones(1)}, tmp_path / "y.safetensors")
    with pytest.raises(ModelFileError, match="several weight files"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("maskbit", r"input_proj\.weight"),
        ("maskbit_tokenizer", r"quantize\.codebook"),
        ("maskgen_vq", r"embeddings\.weight"),
    ],
)
def test_a_file_of_another_family_than_was_said(family: str, expected: str, tmp_path: Path) -> None:
    path = write(tmp_path / "other.bin", published_state("maskgit_vqgan"))
    message = (
        rf"other\.bin is no file of {family}: expected a matrix {expected}; its keys begin with"
    )
    with pytest.raises(ModelFileError, match=message):
        from_pretrained(path, family=family)
    write(path, {expected.replace("\\", ""): torch.ones(3)})
    with pytest.raises(ModelFileError, match=message):
        from_pretrained(path, family=family)
    write(path, {"embeddings.weight": torch.ones(3, 2)})
    with pytest.raises(ModelFileError, match=rf"other\.bin is no file of {family}: expected"):
        from_pretrained(path, family=family)


@pytest.mark.parametrize("content", ['{"num_layers": 1', "", "[]", "\0\xff"])
def test_a_damaged_config_is_told(content: str, tmp_path: Path) -> None:
    save_published(build("meissonic", SIZES["meissonic"]), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelFileError, match=r"config\.json must be a JSON object of sizes"):
        from_pretrained(tmp_path)


def test_a_hub_id_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"softdimo-fast\[hub\]"):
        from_pretrained("someone/something")


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path) -> None:
    model = build("maskgit", SIZES["maskgit"])
    folder = save_pretrained(model, tmp_path / "ours")
    with pytest.raises(FileExistsError, match="holds something already"):
        save_pretrained(model, folder)
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(OSError, match="file"):
        save_pretrained(model, blocked / "ours")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        save_published(model, tmp_path / "m.onnx")
    for ending in (".safetensors", ".bin"):
        path = blocked.rename(tmp_path / f"file{ending}")
        with pytest.raises(FileExistsError, match=rf"file\{ending} exists already"):
            save_published(model, path)
        assert path.read_text() == "x"
        blocked = path.rename(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "ours"]


def test_wrong_sizes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hiden_dim.*did you mean 'hidden_dim'"):
        build("maskgit", {"hiden_dim": 16})
    with pytest.raises(ConfigError, match="family"):
        build("maskgitt", {})


LISTINGS = ROOT.parent / "shared" / "design" / "checkpoints"


@pytest.mark.skipif(not LISTINGS.exists(), reason="no listings of the published checkpoints here")
@pytest.mark.parametrize("bits", [10, 12, 14, 16, 18])
def test_bits_are_read_off_the_published_maskbit_shapes(bits: int) -> None:
    from softdimo_fast.models.files import _clean, _published_sizes

    for family, kind in (("maskbit", "generator"), ("maskbit_tokenizer", "tokenizer")):
        listing = json.loads((LISTINGS / f"maskbit_{kind}_{bits}bit.json").read_text())
        tensors = {
            key: torch.empty(shape, device="meta")
            for key, (shape, *_) in listing.get("keys", listing).items()
        }
        sizes = _published_sizes(Path(family), family, _clean(family, tensors))
        if family == "maskbit":
            assert sizes == {"codebook_size": 2**bits}
        else:
            assert sizes == {"config": {"codebook_size": 2**bits, "token_size": bits}}
