"""Hub ids: what is one, and what of a repository is downloaded. The client is a local copier."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.hub import LocalHub
from support.published import SIZES

from softdimo_fast.models import build, describe, from_pretrained, save_pretrained, save_published
from softdimo_fast.models.clip_files import local_path
from softdimo_fast.models.hub import is_hub_id

PIPELINE, FILES = "MeissonFlow/Meissonic", "llvictorll/Maskgit-pytorch"
VQGAN = "pretrained_maskgit/VQGAN/last.ckpt"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    """A diffusers pipeline, and a repository of files in subfolders."""
    root = tmp_path / "hub"
    for family, folder in (("meissonic", "transformer"), ("meissonic_vqvae", "vqvae")):
        path = root / PIPELINE / folder
        path.mkdir(parents=True)
        model = build(family, SIZES[family], seed=1)
        save_published(model, path / "diffusion_pytorch_model.safetensors")
        (path / "config.json").write_text(json.dumps(SIZES[family]))
    (root / PIPELINE / "model_index.json").write_text("{}")
    (root / PIPELINE / "text_encoder").mkdir()
    (root / PIPELINE / "text_encoder" / "config.json").write_text("{}")
    (root / FILES / VQGAN).parent.mkdir(parents=True)
    save_published(build("maskgit_vqgan", SIZES["maskgit_vqgan"], seed=1), root / FILES / VQGAN)
    (root / FILES / VQGAN).with_name("other.ckpt").write_bytes(b"")
    save_pretrained(build("maskgit", SIZES["maskgit"]), root / "someone" / "ours" / "maskgit")
    monkeypatch.chdir(tmp_path)
    return LocalHub(root, tmp_path / "cache").install(monkeypatch)


def test_a_folder_in_a_repository(hub: LocalHub) -> None:
    for family, folder in (("meissonic", "transformer"), ("meissonic_vqvae", "vqvae")):
        model, expected = from_pretrained(f"{PIPELINE}/{folder}", revision="abc"), SIZES[family]
        assert hub.asked[-1] == (PIPELINE, "abc")
        assert hub.copied() == [
            f"{folder}/config.json", f"{folder}/diffusion_pytorch_model.safetensors",
        ]  # fmt: skip
        reference = build(family, expected, seed=1)
        assert describe(model) == describe(reference)
        weights = reference.state_dict()
        assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    from_pretrained("someone/ours/maskgit")
    assert hub.copied() == ["maskgit/model.json", "maskgit/model.safetensors"]


def test_a_file_in_a_repository(hub: LocalHub) -> None:
    from_pretrained(f"{FILES}/{VQGAN}", sizes=SIZES["maskgit_vqgan"])
    assert hub.copied() == [VQGAN]
    with pytest.raises(FileNotFoundError, match=r"Maskgit-pytorch on the hub holds no VQGAN/last"):
        from_pretrained(f"{FILES}/VQGAN/last.ckpt")


def test_a_pipeline_says_which_subfolders_to_name(hub: LocalHub) -> None:
    message = r"holds no weights .*\*\.ckpt\); .*name the subfolder, transformer/ or vqvae/"
    with pytest.raises(FileNotFoundError, match=message):
        from_pretrained(PIPELINE)
    assert hub.copied() == ["model_index.json"]  # not gigabytes, to say so
    with pytest.raises(FileNotFoundError, match=message):
        from_pretrained(hub.root / PIPELINE)


def test_text_encoders_are_named_by_the_same_rule(hub: LocalHub) -> None:
    assert (local_path(PIPELINE) / "text_encoder" / "config.json").exists()
    assert hub.copied() == ["model_index.json", "text_encoder/config.json"]
    assert local_path(f"{PIPELINE}/text_encoder").name == "text_encoder"
    assert hub.copied() == ["text_encoder/config.json"]


def test_what_the_hub_does_not_have(hub: LocalHub) -> None:
    with pytest.raises(
        FileNotFoundError, match="someone/none/x, and the hub does not give it: 404"
    ):
        from_pretrained("someone/none/x")
    assert hub.asked == [("someone/none", None)]


@pytest.mark.parametrize(
    ("source", "is_one"),
    [
        ("owner/name", True), ("owner/name-1.5/a b/c.bin", True), ("name", False), ("/a/b", False),
        ("./a/b", False), ("../a/b", False), ("~/a/b", False), ("a/b/../c", False), ("a//b", False),
        ("a/b/", False), ("", False),
    ],
)  # fmt: skip
def test_what_is_a_hub_id(source: str, is_one: bool) -> None:
    assert is_hub_id(source) == is_one
