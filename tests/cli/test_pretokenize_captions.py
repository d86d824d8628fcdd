"""``softdimo pretokenize --captions``: from captioned images to a text-to-image GAN that trains on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checks import assert_same_bits
from support.published_runs import Files, brightness, tiny_run, write_files

from softdimo_fast import cli
from softdimo_fast._config import ConfigError
from softdimo_fast.cli.pretokenize import load_image
from softdimo_fast.data.prompts import PromptFile, prompts_digest
from softdimo_fast.data.token_file import TokenFile
from softdimo_fast.diffusion import Draws
from softdimo_fast.models import from_pretrained
from softdimo_fast.recipes.published_build import build_published_trainer
from softdimo_fast.trainers import checkpoint

Image = pytest.importorskip("PIL.Image", reason="images are read with pillow")

RECIPE = {"maskgen_vq": "maskgen_l", "meissonic": "meissonic"}
SIZE = {"maskgen_vq": 16, "meissonic": 8}
# File, caption; an image may have two, and two images the same.
CAPTIONS = [
    ("one.png", "a red cat"), ("deeper/two.jpg", "two\nboats"), ("one.png", "an animal"),
    ("three.png", "a red cat"), ("four.png", "the sea"),
]  # fmt: skip
PROMPTS = ["a red cat", "two boats", "an animal", "the sea"]
LABELS = [0, 1, 2, 0, 3]


@pytest.fixture(scope="module", params=RECIPE)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Teacher and tokenizer of a text-to-image family."""
    return write_files(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder, random = tmp_path / "photos", np.random.default_rng(0)
    for name in dict.fromkeys(name for name, _ in CAPTIONS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(folder / name)
    write_captions(folder, CAPTIONS)
    return folder


def write_captions(folder: Path, captions: Sequence[tuple[str, str]], key: str = "text") -> None:
    lines = [json.dumps({"file_name": name, key: text}) for name, text in captions]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def pretokenize(photos: Path, files: Files, out: Path, *more: str) -> int:
    arguments = [
        "pretokenize", str(photos), "--captions", str(photos / "metadata.jsonl"), "--tokenizer",
        str(files.root / "tokenizer"), "--out", str(out), "--size", str(SIZE[files.family]),
        "--batch-size", "2", "--device", "cpu", *more,
    ]  # fmt: skip
    return cli.main(arguments)


def settings(out: Path) -> list[str]:
    return [f"real_tokens={out}", f"text.prompts={out}.prompts.txt"]


def test_from_captions_to_a_gan(
    photos: Path, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "real.sdt"
    prompts = out.with_name("real.sdt.prompts.txt")
    assert pretokenize(photos, files, out) == 0
    printed = capsys.readouterr()
    assert printed.out == f"5 images with 4 prompts ({prompts}) in {out}\n"
    assert "pretokenize: done" in printed.err
    assert list(PromptFile(prompts)) == PROMPTS
    file = TokenFile.open(out)
    assert file.header.classes == 4
    assert file.header.metadata == {
        "tokenizer": str(files.root / "tokenizer"), "size": SIZE[files.family], "flip": False,
        "captions": str(photos / "metadata.jsonl"), "prompts_sha256": prompts_digest(PROMPTS),
    }  # fmt: skip
    tokens, labels = file.rows(torch.arange(5))
    assert labels.tolist() == LABELS
    model = from_pretrained(files.root / "tokenizer")
    for (name, _), row in zip(CAPTIONS, tokens, strict=True):
        pixels = load_image(photos / name, SIZE[files.family])
        assert_same_bits(model.encode(pixels[None])[0], row)
    # The GAN of the family's recipe trains on it, and sees each image with its own words.
    run = tiny_run(RECIPE[files.family], "adversarial", files, *settings(out))
    folder = tmp_path / "run"
    trainer = build_published_trainer(run, folder, encoder=files.encoder)
    trainer.run()
    assert checkpoint.load(folder / "checkpoints").step == 2
    draws = Draws.of(run.trainer.seed, 0, 4)
    real, condition = trainer.method.objectives[1].real(draws)
    for row, prompt in zip(real, condition.prompt.tolist(), strict=True):
        assert any(
            torch.equal(row, t) and label == prompt for t, label in zip(tokens, LABELS, strict=True)
        )
    expected = files.encoder([PROMPTS[n] for n in condition.prompt.tolist()])
    assert torch.equal(condition.text, expected.text)


@pytest.fixture(scope="module")
def maskgen(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("maskgen"), "maskgen_vq")


def test_tokens_go_with_their_prompts_alone(photos: Path, maskgen: Files, tmp_path: Path) -> None:
    out = tmp_path / "real.sdt"
    assert pretokenize(photos, maskgen, out) == 0
    prompts = tmp_path / "real.sdt.prompts.txt"
    prompts.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(PROMPTS).encode())  # other ends of lines

    def built(family: Files, name: str) -> Any:
        run = tiny_run(name, "adversarial", family, *settings(out))
        return build_published_trainer(run, tmp_path / "run", encoder=family.encoder)

    built(maskgen, "maskgen_l")
    prompts.write_text("\n".join([PROMPTS[1], PROMPTS[0], *PROMPTS[2:]]) + "\n")
    with pytest.raises(
        ConfigError, match=r"text\.prompts: must be the file of prompts that was made"
    ):
        built(maskgen, "maskgen_l")
    prompts.write_text("\n".join(PROMPTS[:3]) + "\n")
    with pytest.raises(ConfigError, match=r"labels are numbers of the 3 prompts in text\.prompts"):
        built(maskgen, "maskgen_l")


def test_numbers_of_prompts_are_no_classes(photos: Path, maskgen: Files, tmp_path: Path) -> None:
    """Even where there are as many of them, and the tokens fit."""
    write_captions(photos, [("one.png", "a"), ("three.png", "b"), ("four.png", "c")])
    out, maskgit = tmp_path / "real.sdt", write_files(tmp_path / "maskgit", "maskgit")
    tokenizer = f"{maskgit.root / 'tokenizer'}"
    assert pretokenize(photos, maskgen, out, "--tokenizer", tokenizer, "--size", "4") == 0
    run = tiny_run("maskgit", "adversarial", maskgit, f"real_tokens={out}", "text.prompts=none")
    with pytest.raises(ConfigError, match="of images whose labels are the teacher's classes"):
        build_published_trainer(run, tmp_path / "run", reward=brightness)


def test_another_key_and_mirrored_images(photos: Path, maskgen: Files, tmp_path: Path) -> None:
    write_captions(photos, CAPTIONS, key="caption")
    out = tmp_path / "real.sdt"
    assert pretokenize(photos, maskgen, out, "--caption-key", "caption", "--flip") == 0
    labels = TokenFile.open(out).rows(torch.arange(10))[1]
    assert labels.tolist() == [label for label in LABELS for _ in range(2)]


def test_images_that_are_not_there(
    photos: Path, maskgen: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "real.sdt"
    (photos / "four.png").unlink()
    assert pretokenize(photos, maskgen, out) == cli.WRONG_INPUT
    message = capsys.readouterr().err
    assert "1 of 5 images cannot be read, more than --bad-share 0.001 allows" in message
    where = f"{photos / 'four.png'} ({photos / 'metadata.jsonl'}, line 5): FileNotFoundError"
    assert where in message
    assert not list(tmp_path.glob("*real.sdt*"))
    assert pretokenize(photos, maskgen, out, "--bad-share", "0.2") == 0
    assert (tmp_path / "real.sdt.skipped.txt").read_text().startswith(where)
    file = TokenFile.open(out)
    assert file.rows(torch.arange(4))[1].tolist() == LABELS[:4]
    assert file.header.classes == 4  # the fourth prompt has no image, and is a prompt


def test_a_stopped_run_leaves_nothing(
    photos: Path, maskgen: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "real.sdt"
    with monkeypatch.context() as patched:

        def interrupt(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr("softdimo_fast.data.prompts.PromptFile.write", interrupt)
        assert pretokenize(photos, maskgen, out) == cli.INTERRUPTED
    assert not list(tmp_path.glob("*real.sdt*"))
    assert pretokenize(photos, maskgen, out) == 0
    assert list(PromptFile(tmp_path / "real.sdt.prompts.txt")) == PROMPTS


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("no JSON\n", "metadata.jsonl, line 1: a line must be a JSON object with 'file_name' and 'text'"),
        ("\n", "metadata.jsonl holds no caption"),
        (None, "--captions must be a file, one JSON object a line, got "),
    ],
)  # fmt: skip
def test_captions_that_are_refused(
    lines: str | None, message: str, photos: Path, maskgen: Files, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = photos / "metadata.jsonl"
    path.unlink() if lines is None else path.write_text(lines)
    assert pretokenize(photos, maskgen, tmp_path / "real.sdt") == cli.WRONG_INPUT
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*real.sdt*"))


def test_a_folder_that_is_none(
    maskgen: Files, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = str(photos / "metadata.jsonl")
    arguments = ["--captions", captions, "--tokenizer", "x", "--out", str(photos / "t.sdt")]
    assert cli.main(["pretokenize", str(photos / "none"), *arguments]) == cli.WRONG_INPUT
    assert "FOLDER must be the folder that captions name images in" in capsys.readouterr().err
