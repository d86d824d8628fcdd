"""``softdimo pretokenize``: a folder of images becomes the token file that training reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checks import assert_same_bits
from torch import Tensor

from softdimo_fast import cli
from softdimo_fast.cli.errors import UsageError
from softdimo_fast.cli.pretokenize import find_images, load_image
from softdimo_fast.data.token_file import TokenFile
from softdimo_fast.models import build, from_pretrained, save_pretrained

Image = pytest.importorskip("PIL.Image", reason="images are read with pillow")

# A VQGAN that halves once: 32 x 32 pixels are 16 x 16 tokens.
VQGAN = {
    "ddconfig": {
        "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "resolution": 32,
        "z_channels": 8,
    },
    "embed_dim": 8, "n_embed": 40,
}  # fmt: skip
SIZE = 32
COUNTS = {"n02": 3, "n01": 5, "n10": 2}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten images of three classes, of several forms and sizes."""
    folder, random = tmp_path / "images", np.random.default_rng(0)
    modes = ["RGB", "L", "RGBA", "P", "CMYK"]
    for name, count in COUNTS.items():
        for number in range(count):
            height, width = (int(n) for n in random.integers(20, 150, 2))
            pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            mode = modes[number]
            path = folder / name / ("deeper" if number == 1 else "") / f"{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels).convert(mode)
            image.save(path.with_suffix(".JPEG" if mode in ("RGB", "L", "CMYK") else ".png"))
    (folder / "n01" / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("tokenizer") / "vqgan"
    return save_pretrained(build("maskgit_vqgan", VQGAN, seed=1), folder)


def pretokenize(images: Path, tokenizer: Path, out: Path, *more: str) -> int:
    arguments = ["pretokenize", str(images), "--tokenizer", str(tokenizer), "--out", str(out)]
    return cli.main(
        [*arguments, "--size", str(SIZE), "--batch-size", "4", "--device", "cpu", *more]
    )


def encoded(images: Path, tokenizer: Path, *, flip: bool = False) -> tuple[Tensor, Tensor]:
    """One image at a time, without the command's batches and threads."""
    model = from_pretrained(tokenizer)
    tokens, labels = [], []
    for image in find_images(images).images:
        pixels = load_image(image.path, SIZE)[None]
        for version in (pixels, pixels.flip(-1)) if flip else (pixels,):
            tokens.append(model.encode(version))
            labels.append(image.label)
    return torch.cat(tokens), torch.tensor(labels)


@pytest.mark.parametrize("flip", [False, True])
def test_the_file_holds_what_the_tokenizer_says(
    images: Path, tokenizer: Path, tmp_path: Path, flip: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "tokens.sdt"
    assert pretokenize(images, tokenizer, out, *(["--flip"] if flip else [])) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{20 if flip else 10} images of 3 classes in {out}\n"
    assert "pretokenize: done" in printed.err
    file = TokenFile.open(out)
    header = file.header
    assert (header.vocabulary, header.token_shape, header.classes) == (40, (256,), 3)
    assert header.metadata == {
        "tokenizer": str(tokenizer), "size": SIZE, "flip": flip, "class_names": ["n01", "n02", "n10"],
    }  # fmt: skip
    found, expected = file.rows(torch.arange(len(file))), encoded(images, tokenizer, flip=flip)
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b)
    assert found[1].bincount().tolist() == [n * (1 + flip) for n in (5, 3, 2)]


def test_another_size_than_the_tokenizers_is_warned_of(
    images: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretokenize(images, tokenizer, tmp_path / "t.sdt", "--size", "16") == 0
    assert (
        "warning: --size 16 makes tokens [64] of an image; the tokenizer's config says [256]"
        in capsys.readouterr().err
    )
    assert TokenFile.open(tmp_path / "t.sdt").header.token_shape == (64,)


# ---------------------------------------------------------------------------------------------------
# images


def published_crop(path: Path, size: int) -> Any:
    """``center_crop_arr`` of guided diffusion (openai/guided-diffusion, image_datasets.py), as it stands."""
    image = Image.open(path).convert("RGB")
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    crop_y, crop_x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[crop_y : crop_y + size, crop_x : crop_x + size]


@pytest.mark.parametrize(
    ("height", "width"), [(32, 32), (17, 90), (63, 65), (64, 64), (201, 150), (130, 311)]
)
def test_images_are_cut_as_adm_cuts_them(tmp_path: Path, height: int, width: int) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    image = load_image(path, SIZE)
    assert image.dtype == torch.float32
    expected = torch.from_numpy(published_crop(path, SIZE).astype(np.float32) / 127.5 - 1)
    assert_same_bits(image, expected.permute(2, 0, 1))


# ---------------------------------------------------------------------------------------------------
# what cannot be read


def test_too_many_bad_images(
    images: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = images / "n02" / "bad.png"
    bad.write_bytes(b"no image")
    out = tmp_path / "tokens.sdt"
    assert pretokenize(images, tokenizer, out) == cli.WRONG_INPUT
    message = capsys.readouterr().err
    assert "1 of 11 images cannot be read, more than --bad-share 0.001 allows" in message
    assert f"{bad}: UnidentifiedImageError" in message
    assert not list(tmp_path.glob("*tokens.sdt*"))


def test_a_few_bad_images_are_listed(
    images: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = images / "n01" / "0.JPEG", images / "n01" / "cut.JPEG"
    bad.write_bytes(good.read_bytes()[:300])
    out, listed = tmp_path / "tokens.sdt", tmp_path / "tokens.sdt.skipped.txt"
    assert pretokenize(images, tokenizer, out, "--bad-share", "0.1") == 0
    assert f"1 that cannot be read are listed in {listed}" in capsys.readouterr().out
    assert listed.read_text().startswith(f"{bad}: OSError: ")
    file = TokenFile.open(out)
    bad.unlink()
    for a, b in zip(file.rows(torch.arange(10)), encoded(images, tokenizer), strict=True):
        assert_same_bits(a, b)
    assert pretokenize(images, tokenizer, out) == 0  # again, without it
    assert not listed.exists()


def test_a_stopped_run_leaves_nothing_and_begins_anew(
    images: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tokens.sdt"
    with monkeypatch.context() as patched:

        def interrupt(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr("softdimo_fast.data.token_file.TokenFileWriter.finish", interrupt)
        assert pretokenize(images, tokenizer, out) == cli.INTERRUPTED
    assert not out.exists()
    assert pretokenize(images, tokenizer, out) == 0
    assert len(TokenFile.open(out)) == 10


# ---------------------------------------------------------------------------------------------------
# wrong input


def test_folders_without_classes_or_images(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be a folder with one subfolder per class"):
        find_images(tmp_path / "none")
    with pytest.raises(UsageError, match="holds none"):
        find_images(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty holds no image"):
        find_images(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "1"], "does not take images of --size 1"),
        (["--batch-size", "0"], "--batch-size: must be a number >= 1, got 0"),
        (["--bad-share", "2"], "--bad-share: must be a number >= 0 and <= 1"),
        (["--device", "nonsense"], "--device must be one that torch has here, got nonsense"),
        (["--tokenizer", "{teacher}"], "--tokenizer must be a tokenizer, got a MaskGitTransformer"),
        (["--tokenizer", "nowhere"], "there is no file or folder nowhere"),
    ],
)
def test_wrong_input_is_told(
    arguments: list[str], message: str, images: Path, tokenizer: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    sizes = {
        "img_size": 32, "hidden_dim": 16, "codebook_size": 12, "depth": 1, "heads": 2, "mlp_dim": 24,
        "nclass": 3,
    }  # fmt: skip
    teacher = save_pretrained(build("maskgit", sizes, seed=1), tmp_path / "teacher")
    filled = [argument.replace("{teacher}", str(teacher)) for argument in arguments]
    assert pretokenize(images, tokenizer, tmp_path / "t.sdt", *filled) == cli.WRONG_INPUT
    assert message in capsys.readouterr().err
