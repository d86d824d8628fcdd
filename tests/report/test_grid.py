"""Contact sheets: every pixel where it belongs, and what cannot be drawn refused."""

from __future__ import annotations

import builtins
import io
from typing import Any

import numpy as np
import pytest
import torch
from support.process import run_python

from softdimo_fast.report.grid import comparison_grid, image_grid, png_bytes

pytest.importorskip("PIL")


def pixels(image: Any) -> np.ndarray:
    return np.asarray(image)


def test_each_pixel_becomes_a_square_at_its_place() -> None:
    images = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    sheet = pixels(image_grid(images, columns=2, scale=3, gap=1))
    assert sheet.shape == (13, 13, 4)
    for index, level in enumerate((0, 128, 255)):
        line, column = divmod(index, 2)
        tile = sheet[line * 7 : line * 7 + 6, column * 7 : column * 7 + 6]
        assert (tile == (level, level, level, 255)).all()
    assert (sheet[6] == 0).all()  # the gap
    assert (sheet[7:, 7:] == 0).all()  # no fourth image


def test_a_known_picture_pixel_by_pixel() -> None:
    image = torch.linspace(-1, 1, 6).reshape(1, 1, 2, 3)
    levels = pixels(image_grid(image, 1, 1))[..., 0]
    assert levels.tolist() == [[0, 51, 102], [153, 204, 255]]
    enlarged = pixels(image_grid(image, 1, 4))[..., 0]
    assert (enlarged == np.kron(levels, np.ones((4, 4)))).all()


def test_colours_and_clamping() -> None:
    image = torch.tensor([5.0, -1.0, -7.0]).reshape(1, 3, 1, 1)
    assert pixels(image_grid(image, 1))[0, 0].tolist() == [255, 0, 0, 255]


def test_ink_turns_grey_round_and_leaves_colours() -> None:
    grey = torch.tensor([1.0]).reshape(1, 1, 1, 1)
    assert pixels(image_grid(grey, 1, ink=True))[0, 0].tolist() == [0, 0, 0, 255]
    colour = torch.tensor([1.0, -1.0, 1.0]).reshape(1, 3, 1, 1)
    assert pixels(image_grid(colour, 1, ink=True))[0, 0].tolist() == [255, 0, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_floating_dtype_strides_and_gradients(dtype: torch.dtype) -> None:
    images = torch.rand(2, 4, 5, 1, dtype=dtype).permute(0, 3, 1, 2).requires_grad_()
    expected = pixels(image_grid(images.detach().float().contiguous(), 2))
    assert (pixels(image_grid(images, 2)) == expected).all()


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (
            torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
            {},
            TypeError,
            "floating tensor, got torch.uint8",
        ),
        ([[0.0]], {}, TypeError, "floating tensor, got list"),
        (torch.zeros(1, 8, 8), {}, ValueError, r"got \[1, 8, 8\]"),
        (torch.zeros(2, 2, 8, 8), {}, ValueError, r"C = 1 or 3, got \[2, 2, 8, 8\]"),
        (torch.zeros(0, 1, 8, 8), {}, ValueError, r"N, h, w >= 1"),
        (torch.full((1, 1, 2, 2), torch.nan), {}, ValueError, "must be finite"),
        (torch.zeros(1, 1, 2, 2), {"columns": 0}, ValueError, "columns must be at least 1, got 0"),
        (torch.zeros(1, 1, 2, 2), {"scale": 0}, ValueError, "scale must be at least 1, got 0"),
        (torch.zeros(1, 1, 2, 2), {"gap": -1}, ValueError, "gap must be at least 0, got -1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    images: Any, options: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        image_grid(images, **{"columns": 2, **options})


def test_png_bytes_can_be_read_again_and_repeat() -> None:
    from PIL import Image

    sheet = image_grid(torch.rand(5, 1, 8, 8), 3, 4)
    data = png_bytes(sheet)
    assert data == png_bytes(sheet)
    again = Image.open(io.BytesIO(data))
    assert again.size == sheet.size
    assert (pixels(again.convert("RGBA")) == pixels(sheet)).all()


def test_comparison_grid_holds_every_image_beside_its_label() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = [
        ("first", torch.rand(4, 1, 8, 8, generator=generator) * 2 - 1),
        ("second\nlonger label", torch.rand(7, 1, 8, 8, generator=generator) * 2 - 1),
    ]
    sheet = comparison_grid(rows, columns=4, scale=2, text_size=16)
    assert sheet.mode == "RGB"
    drawn = pixels(sheet)
    assert (drawn[0] == 255).all()
    assert (drawn[:, 0] == 255).all()
    assert (drawn < 100).any()
    for _, images in rows:
        for image in images:
            assert contains(drawn, pixels(image_grid(image[None], 1, 2, ink=True))[..., :3])
    wider = comparison_grid([("first label, much longer", rows[0][1])], scale=2, text_size=16)
    assert wider.width > comparison_grid([("f", rows[0][1])], scale=2, text_size=16).width


def contains(sheet: np.ndarray, tile: np.ndarray) -> bool:
    windows = np.lib.stride_tricks.sliding_window_view(sheet, tile.shape)[..., 0, :, :, :]
    return bool((windows == tile).all(axis=(-3, -2, -1)).any())


def test_notes_stand_below_their_images() -> None:
    images = torch.full((3, 1, 8, 8), -1.0)  # white as ink on paper: what is dark is text
    with_notes = comparison_grid([("", images)], scale=4, notes={"": ["7", "8", "9"]})
    dark = (pixels(with_notes) < 128).all(axis=-1)
    below = dark[26 + 32 :]
    assert below.any()
    assert not dark[: 26 + 32].any()
    left = with_notes.width - 26 - (3 * 32 + 2 * 4)
    for index in range(3):
        start = left + index * 36
        assert below[:, start : start + 32].any()
    assert with_notes.height > comparison_grid([("", images)], scale=4).height


def test_wrong_rows_and_notes_are_refused() -> None:
    rows = [("a", torch.zeros(2, 1, 8, 8))]
    with pytest.raises(ValueError, match="at least one row"):
        comparison_grid([])
    with pytest.raises(ValueError, match=r"labels of rows \(a\), got 'b'"):
        comparison_grid(rows, notes={"b": []})
    with pytest.raises(ValueError, match="each of its 2 images, got 1"):
        comparison_grid(rows, notes={"a": ["1"]})


def test_missing_pillow_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("PIL"):
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r'pip install "softdimo-fast\[report\]"'):
        image_grid(torch.zeros(1, 1, 2, 2), 1)


def test_importing_the_report_loads_neither_pillow_nor_matplotlib() -> None:
    code = (
        "import sys, softdimo_fast.report.page, softdimo_fast.report.curves, softdimo_fast.report.grid\n"
        "assert not {'PIL', 'matplotlib'} & set(sys.modules)"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
