"""``softdimo train``, ``sample`` and ``tteo`` on published teachers, from files to files."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import clip
from support.published_runs import MATCH, PROMPTS, TOKENIZER, Files, tiny_model, write_files

from softdimo_fast.cli import main
from softdimo_fast.models import (
    create,
    describe,
    from_pretrained,
    save_pretrained,
    save_published,
)
from softdimo_fast.recipes.build import is_finished, trained_role

SMALL = (
    "trainer.device=cpu", "trainer.steps=2", "trainer.batch_size=4", "trainer.accumulation=2",
    "trainer.checkpoint_every=1",
)  # fmt: skip


def softdimo(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert softdimo(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def images(out: Path, *arguments: object) -> torch.Tensor:
    assert softdimo("sample", *arguments, "--out", out, "--count", 3) == 0
    return load_file(out)["images"]


@pytest.fixture(scope="module")
def maskgit(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("maskgit"), "maskgit")


# ---- class-conditional -------------------------------------------------------------------------------------


def test_train_sample_and_resume(
    maskgit: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, settings = tmp_path / "adversarial", (*maskgit.settings, *SMALL)
    arguments = ("train", "adversarial", "maskgit", "--out", out, "--set", *settings)
    assert softdimo(*arguments) == 0
    assert is_finished(out)
    assert f"adversarial: 2 steps, in {out}" in capsys.readouterr().out
    assert "holds a run already: --resume goes on with it" in refused(capsys, *arguments)
    assert softdimo(*arguments, "--resume") == 0
    sampled = images(tmp_path / "a.safetensors", out)
    assert sampled.shape == (3, 3, 4, 4)
    soft = images(tmp_path / "b.safetensors", out, "--decode", "soft")
    assert not torch.equal(sampled, soft)
    (tmp_path / "here").mkdir()
    assert softdimo("sample", out, "--out", tmp_path / "here" / "grid.png", "--count", 5) == 0
    exported = tmp_path / "exported"
    assert softdimo("export", out, "--out", exported) == 0
    student, kept = trained_role(out, "student"), from_pretrained(exported)
    assert describe(kept) == describe(student)
    weights = student.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in kept.state_dict().items())


def test_bfloat16_as_the_recipe_has_it(maskgit: Files, tmp_path: Path) -> None:
    out, settings = tmp_path / "run", (*maskgit.settings, *SMALL)
    assert softdimo("train", "distillation", "maskgit", "--out", out, "--set", *settings) == 0
    run = json.loads(next((out / "checkpoints").glob("step_*/config.json")).read_text())["run"]
    assert run["trainer"]["autocast"] == "bfloat16"
    assert run["trainer"]["seed"] == 3407


def test_sample_a_teacher(
    maskgit: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, tokenizer = maskgit.root / "teacher", maskgit.root / "tokenizer"
    rest = ("--tokenizer", tokenizer)
    first = images(tmp_path / "a.safetensors", teacher, *rest)
    assert first.shape == (3, 3, 4, 4)
    for changes in (["--steps", 2], ["--seed", 1], ["--one-step"], ["--condition", 0]):
        other = images(tmp_path / "b.safetensors", teacher, *rest, *changes)
        assert not torch.equal(other, first), changes
    again = images(tmp_path / "b.safetensors", teacher, *rest, "--batch-size", 1)
    torch.testing.assert_close(again, first, rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    out = ("--out", tmp_path / "c.png")
    for arguments, words in (
        ([teacher], "sample.tokenizer: must be given: a file, a folder or a hub id"),
        ([teacher, *rest, "--decode", "soft"], "--decode is a generator's: a teacher samples"),
        ([teacher, *rest, "--one-step", "--steps", 4], "--steps is a teacher's"),
        ([teacher, *rest, "--set", "step=4"], "did you mean 'steps'"),
        ([teacher, *rest, "--condition", 3], "condition: must be a number >= 0 and <= 2, got 3"),
        ([teacher, *rest, "--prompts", tmp_path / "no"], "No such file"),
        ([teacher, *rest, "--batch-size", 0], "--batch-size: must be a number >= 1"),
        ([tokenizer, *rest], "sample.model: must be one of 'maskgit'"),
        ([tmp_path / "nothing", *rest], "there is no file or folder"),
    ):
        assert words in refused(capsys, "sample", *arguments, *out)


def test_a_missing_path_is_said_before_any_work(
    maskgit: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    said = refused(capsys, "train", "adversarial", "maskgit", "--out", out)
    assert re.search(r"teacher: must be given: .* \(also missing: real_tokens\)", said)
    paths = [f"teacher={tmp_path / 'no.pth'}", f"real_tokens={tmp_path / 'no.sdt'}"]
    said = refused(capsys, "train", "adversarial", "maskgit", "--out", out, "--set", *paths)
    assert "teacher: must be a file, a folder or a hub id (owner/name[/path]) that is there" in said
    assert "tteo maskgit" in refused(capsys, "train", "tteo", "maskgit", "--out", out)
    said = refused(capsys, "tteo", "maskgit", "--out", out)
    assert "generator: must be given: a finished run, or a one-step generator's weights" in said
    assert not out.exists()


def test_a_model_source_without_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that is a model's is told from what may be a mistyped run; nothing is downloaded."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    Path("published").mkdir()
    Path("empty").mkdir()
    save_published(tiny_model("maskgit"), Path("published", "MaskGIT.pth"))
    out = ("--out", "a.png")
    for source in ("published", "published/MaskGIT.pth"):
        said = refused(capsys, "sample", source, *out)
        assert "sample.tokenizer: must be given: a file, a folder or a hub id" in said
    for source in ("empty", "owner/name", "owner/name/transformer"):
        said = refused(capsys, "sample", source, "--one-step", *out)
        assert f"{source} holds no trained run (no checkpoint was found); of a published" in said
        assert "--tokenizer must be given: a file, a folder or a hub id" in said
    said = refused(capsys, "sample", "owner/name/transformer", "--tokenizer", "published", *out)
    assert "owner/name/transformer is no local path; to load from the hub: pip install" in said


def test_a_published_file_of_other_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_published(tiny_model("maskgit"), tmp_path / "MaskGIT_ImageNet_256.pth")
    said = refused(
        capsys, "train", "distillation", "maskgit", "--out", tmp_path / "run", "--set",
        f"teacher={path}", *SMALL,
    )  # fmt: skip
    assert "does not fit MaskGitTransformer" in said


# ---- text-to-image, with CLIP models from transformers' own files ------------------------------------------

WORDS = {"text_embed_dim": 32}
TEXT_SIZES: dict[str, dict[str, Any]] = {
    "maskgen_vq": WORDS,
    "tatitok_vq": {},
    "meissonic": {"joint_attention_dim": 32, **MATCH["meissonic"]},
}


@pytest.fixture
def text(request: pytest.FixtureRequest, monkeypatch: Any, tmp_path: Path) -> tuple[str, Path]:
    """A family's files with a text encoder and two rewards."""
    pytest.importorskip("transformers", reason="needs transformers")
    family, root = request.param, tmp_path / "files"
    monkeypatch.setattr(clip, "POOLED", 32)
    write_files(root, family)
    sizes = tiny_model(TOKENIZER[family]).config
    if family == "maskgen_vq":
        tokenizer = create(replace(sizes, text_embed_dim=32, text_context_length=clip.CONTEXT))
        save_pretrained(tokenizer, root / "tokenizer_32")
    else:
        save_pretrained(tiny_model(TOKENIZER[family], seed=1), root / "tokenizer_32")
    save_pretrained(tiny_model(family, **TEXT_SIZES[family]), root / "teacher_32")
    for number, name in enumerate(("encoder", "clip", "pick_score")):
        clip.transformers_clip(root / name, seed=number)
        clip.write_byte_tokenizer(root / name)
    return family, root


RECIPE = {"maskgen_vq": "maskgen_l", "meissonic": "meissonic"}


@pytest.mark.parametrize("text", ["maskgen_vq", "meissonic"], indirect=True)
def test_rewards_of_text_to_image(text: tuple[str, Path], tmp_path: Path) -> None:
    family, root = text
    recipe, out = RECIPE[family], tmp_path / "reward"
    files = (
        f"tokenizer={root / 'tokenizer_32'}", f"text.prompts={root / 'prompts.txt'}",
        f"text.encoder={root / 'encoder'}", f"rewards.clip.path={root / 'clip'}",
        "rewards.image_reward=none",
    )  # fmt: skip
    settings = (*files, *SMALL, f"teacher={root / 'teacher_32'}", "trainer.log_every=1")
    assert softdimo("train", "reward", recipe, "--out", out, "--set", *settings) == 0
    line = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert line["reward/value"] != 0
    sampled = images(tmp_path / "a.safetensors", out)
    assert sampled.shape[:2] == (3, 3)
    teacher = images(
        tmp_path / "b.safetensors", root / "teacher_32", "--tokenizer", root / "tokenizer_32",
        "--prompts", root / "prompts.txt", "--text-encoder", root / "encoder", "--steps", 2,
    )  # fmt: skip
    assert teacher.shape == sampled.shape
    search = (
        *files, f"generator={out}", f"rewards.pick_score.path={root / 'pick_score'}",
        f"rewards.pick_score.tokenizer={root / 'clip'}", "rewards.hps=none", "device=cpu",
        "samples=3", "search.candidates=2", "search.iterations=1",
    )  # fmt: skip
    assert softdimo("tteo", recipe, "--out", tmp_path / "tteo", "--set", *search) == 0
    found = json.loads((tmp_path / "tteo" / "tteo.json").read_text())
    assert found["wanted"] == list(range(len(PROMPTS)))
    pairs = zip(found["reward_before"], found["reward_after"], strict=True)
    assert all(after >= before for before, after in pairs)


def test_rewards_of_classes(
    maskgit: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A class-conditional generator is rewarded for its class's prompt."""
    pytest.importorskip("transformers", reason="needs transformers")
    clip.transformers_clip(tmp_path / "clip")
    clip.write_byte_tokenizer(tmp_path / "clip")
    settings = (
        *maskgit.settings, *SMALL, f"rewards.clip.path={tmp_path / 'clip'}",
        "rewards.image_reward=none",
    )  # fmt: skip
    out = tmp_path / "run"
    assert softdimo("train", "reward", "maskgit", "--out", out, "--set", *settings) == 0
    assert is_finished(out)
    capsys.readouterr()
    missing = (*settings[:-1], f"rewards.image_reward.path={tmp_path}")
    said = refused(
        capsys, "train", "reward", "maskgit", "--out", tmp_path / "other", "--set", *missing
    )
    assert f"there is no file {tmp_path / 'ImageReward.pt'}" in said
