"""Contact sheets of images, drawn with Pillow: enlarged without smoothing, so that every pixel is seen."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

INSTALL = 'pip install "softdimo-fast[report]"'
PAPER = (255, 255, 255, 255)
INK = (24, 26, 31, 255)
MUTED = (90, 95, 105, 255)
CLEAR = (0, 0, 0, 0)


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageDraw
        import PIL.ImageFont
    except ImportError as error:
        raise ImportError(f"drawing images needs Pillow: {INSTALL}") from error
    return PIL


def image_grid(
    images: Tensor, columns: int, scale: int = 1, *, gap: int | None = None, ink: bool = False
) -> Image:
    """The images side by side, row after row, each pixel enlarged to a square; gaps are transparent.

    Args:
        images: floating ``[N, C, h, w]`` on any device, N >= 1, C = 1 (grey) or 3 (RGB); -1 is black, 1 is
            white, and what lies outside is clamped.
        columns: images in a row, >= 1. An incomplete last row is filled up with transparency.
        scale: side of an enlarged pixel, >= 1.
        gap: pixels between images; default: one enlarged pixel.
        ink: show grey images as ink on paper, 1 is black and -1 is white; colours stay as they are.

    Returns:
        An RGBA picture of ``columns * (w * scale + gap) - gap`` by ``ceil(N / columns) * (h * scale + gap) -
        gap`` pixels.

    Raises:
        TypeError: ``images`` is not a floating tensor.
        ValueError: a shape or number is not as above, or a pixel is NaN or infinite.
        ImportError: Pillow is missing.
    """
    pixels = _checked_pixels(images, ink)
    _check_at_least("columns", columns, 1)
    _check_at_least("scale", scale, 1)
    gap = scale if gap is None else gap
    _check_at_least("gap", gap, 0)
    module = _pillow().Image
    height, width = pixels.shape[1] * scale, pixels.shape[2] * scale
    lines = -(-len(pixels) // columns)
    size = (columns * (width + gap) - gap, lines * (height + gap) - gap)
    sheet: Image = module.new("RGBA", size, CLEAR)
    for index, array in enumerate(pixels.numpy()):
        tile = module.fromarray(array, "RGB").resize((width, height), module.Resampling.NEAREST)
        line, column = divmod(index, columns)
        sheet.paste(tile, (column * (width + gap), line * (height + gap)))
    return sheet


def _checked_pixels(images: Tensor, ink: bool) -> Tensor:
    """uint8 ``[N, h, w, 3]`` on the CPU."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = str(images.dtype) if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"image_grid: images must be a floating tensor, got {kind}")
    if images.dim() != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            "image_grid: images must be [N, C, h, w] with N, h, w >= 1 and C = 1 or 3, got "
            f"{list(images.shape)}"
        )
    values = images.detach().float().cpu()
    if not bool(torch.isfinite(values).all()):
        raise ValueError("image_grid: images must be finite, got NaN or infinity")
    if ink and values.shape[1] == 1:
        values = -values
    levels = ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"image_grid: {name} must be at least {least}, got {value}")


def png_bytes(image: Image) -> bytes:
    """``image`` as a PNG file; the same picture gives the same bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def comparison_grid(
    rows: Sequence[tuple[str, Tensor]],
    *,
    columns: int | None = None,
    scale: int = 8,
    text_size: int = 26,
    notes: Mapping[str, Sequence[str]] | None = None,
    ink: bool = True,
) -> Image:
    """Labelled rows of images on white paper, one below the other: the contact sheet ``grid.png``.

    Args:
        rows: (label, images) pairs from top to bottom, at least one; images as for ``image_grid``. A
            label may hold line breaks.
        columns: images in a line; default: as many as the longest row has. Longer rows go on below.
        scale: side of an enlarged pixel.
        text_size: of the labels, in pixels.
        notes: for some labels, a short text below each image of that row.
        ink: as for ``image_grid``.

    Returns:
        An opaque RGB picture.

    Raises:
        ValueError: no rows, a note for a label that is not there, or not one note for each image; and as
            ``image_grid``.
        ImportError: Pillow is missing.
    """
    notes = dict(notes or {})
    _check_rows(rows, notes)
    columns = columns or max(len(images) for _, images in rows)
    pillow = _pillow()
    font = pillow.ImageFont.load_default(text_size)
    small = pillow.ImageFont.load_default(max(12, round(text_size * 0.8)))
    strips = [
        _strip(images, columns, scale, ink, notes.get(label), small) for label, images in rows
    ]
    labels = [_text_block(label, font) for label, _ in rows]
    margin, between = text_size, round(text_size * 0.75)
    left = margin + max(label.width for label in labels) + margin
    width = left + max(strip.width for strip in strips) + margin
    heights = [max(a.height, b.height) for a, b in zip(labels, strips, strict=True)]
    height = 2 * margin + sum(heights) + between * (len(rows) - 1)
    sheet: Image = pillow.Image.new("RGBA", (width, height), PAPER)
    top = margin
    for label, strip, (_, images), used in zip(labels, strips, rows, heights, strict=True):
        first_line = min(images.shape[2] * scale, used)
        sheet.alpha_composite(label, (margin, top + max(0, (first_line - label.height) // 2)))
        sheet.alpha_composite(strip, (left, top))
        top += used + between
    return sheet.convert("RGB")


def _check_rows(rows: Sequence[tuple[str, Tensor]], notes: Mapping[str, Sequence[str]]) -> None:
    if not rows:
        raise ValueError("comparison_grid: rows must hold at least one row, got none")
    counts = {label: len(images) for label, images in rows}
    for label, texts in notes.items():
        if label not in counts:
            raise ValueError(
                f"comparison_grid: notes must be for labels of rows ({', '.join(counts)}), got {label!r}"
            )
        if len(texts) != counts[label]:
            raise ValueError(
                f"comparison_grid: notes for {label!r} must be one for each of its {counts[label]} "
                f"images, got {len(texts)}"
            )


def _strip(
    images: Tensor, columns: int, scale: int, ink: bool, notes: Sequence[str] | None, font: Any
) -> Image:
    """One row's images, with its notes below each image."""
    if notes is None:
        return image_grid(images, columns, scale, ink=ink)
    pillow = _pillow()
    gap, line_height = scale, _text_height(font)
    pitch_x, pitch_y = images.shape[3] * scale + gap, images.shape[2] * scale + gap + line_height
    lines = -(-len(images) // columns)
    strip: Image = pillow.Image.new(
        "RGBA", (columns * pitch_x - gap, lines * pitch_y), (0, 0, 0, 0)
    )
    for line in range(lines):
        part = image_grid(images[line * columns : (line + 1) * columns], columns, scale, ink=ink)
        strip.paste(part, (0, line * pitch_y))
    draw = pillow.ImageDraw.Draw(strip)
    for index, note in enumerate(notes):
        line, column = divmod(index, columns)
        x, y = column * pitch_x, line * pitch_y
        centre = x + (pitch_x - gap) / 2
        draw.text((centre, y + pitch_y - line_height), note, fill=MUTED, font=font, anchor="ma")
    return strip


def _text_block(text: str, font: Any) -> Image:
    pillow = _pillow()
    lines = text.splitlines() or [""]
    height = _text_height(font)
    width = max(1, *(round(font.getlength(line)) + 1 for line in lines))
    block: Image = pillow.Image.new("RGBA", (width, height * len(lines)), CLEAR)
    draw = pillow.ImageDraw.Draw(block)
    for index, line in enumerate(lines):
        draw.text((0, index * height), line, fill=INK, font=font, anchor="la")
    return block


def _text_height(font: Any) -> int:
    ascent, descent = font.getmetrics()
    return int(ascent + descent)
