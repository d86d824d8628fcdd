"""``softdimo export``: a published file becomes a folder of ours, and that the same file again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.hub import LocalHub
from support.published import SIZES as PUBLISHED_SIZES

from softdimo_fast import cli
from softdimo_fast.models import build, from_pretrained, save_published
from softdimo_fast.models.files import sha256

SIZES = {
    "img_size": 32, "hidden_dim": 16, "codebook_size": 12, "depth": 1, "heads": 2, "mlp_dim": 24, "nclass": 3,
}  # fmt: skip


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return save_published(build("maskgit", SIZES, seed=1), tmp_path / "MaskGIT.pth")


def test_there_and_back(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, back = tmp_path / "ours", tmp_path / "back.pth"
    sizes = json.dumps(SIZES)
    assert cli.main(["export", str(published), "--out", str(ours), "--sizes", sizes]) == 0
    assert capsys.readouterr().out.startswith("maskgit, 0.0 million parameters, in ")
    assert json.loads((ours / "model.json").read_text())["source"]["file"] == "MaskGIT.pth"
    assert cli.main(["export", str(ours), "--out", str(back), "--published"]) == 0
    before, after = (
        torch.load(path, weights_only=True)["model_state_dict"] for path in (published, back)
    )
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert from_pretrained(ours).config == from_pretrained(back, sizes=SIZES).config


def test_the_weight_file_that_was_read_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a folder and of a hub source too."""
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "hub" / "MeissonFlow" / "Meissonic"
    (repository / "vqvae").mkdir(parents=True)
    name = "diffusion_pytorch_model.safetensors"
    model = build("meissonic_vqvae", PUBLISHED_SIZES["meissonic_vqvae"], seed=1)
    file = save_published(model, repository / "vqvae" / name)
    LocalHub(tmp_path / "hub", tmp_path / "cache").install(monkeypatch)
    for source in (str(repository / "vqvae"), "MeissonFlow/Meissonic/vqvae"):
        out = tmp_path / "ours" / str(len(source))
        assert cli.main(["export", source, "--out", str(out)]) == 0
        recorded = json.loads((out / "model.json").read_text())["source"]
        assert recorded == {"file": name, "sha256": sha256(file)}
    back = tmp_path / "back" / name
    back.parent.mkdir()
    assert cli.main(["export", str(out), "--out", str(back), "--published"]) == 0
    assert sorted(path.name for path in back.parent.iterdir()) == ["config.json", name]
    assert sha256(back) == sha256(file)
    assert cli.main(["export", str(out), "--out", str(back), "--published"]) == 2
    assert from_pretrained(back.parent).config == model.config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pth", "--out", "x"], "there is no file or folder nowhere.pth"),
        (["{published}", "--out", "x", "--sizes", "{"], "--sizes must be JSON, got '{'"),
        (["{published}", "--out", "x"], "does not fit MaskGitTransformer of these sizes"),
        (["{published}", "--out", "x", "--family", "maskbti"], "did you mean 'maskbit'"),
        (["{published}", "--out", "x", "--sizes", '{"heds": 2}'], "did you mean 'heads'"),
    ],
)
def test_wrong_input_is_told(
    arguments: list[str],
    message: str,
    published: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = [argument.replace("{published}", str(published)) for argument in arguments]
    assert cli.main(["export", *filled]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
