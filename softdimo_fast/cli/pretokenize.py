"""``softdimo pretokenize``: a folder of images to one file of tokens; training then decodes no image."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from softdimo_fast.cli.arguments import CaptionFile, DeviceName
from softdimo_fast.cli.errors import UsageError, require_folder

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
SHOWN = 5  # skipped images in a message


@dataclass(frozen=True)
class ImageFile:
    """One image of the folder.

    Attributes:
        path: where it is.
        label: the number of its class folder, counted in sorted order, or of its caption's prompt.
        told: where it was found, for messages.
    """

    path: Path
    label: int
    told: str = ""


@dataclass(frozen=True)
class ImageFiles:
    """The images of the folder.

    Attributes:
        images: in the order in which they are encoded.
        names: what the labels count: class folders, or prompts.
        metadata: what the token file says of them.
        captioned: whether the names are prompts.
    """

    images: Sequence[ImageFile]
    names: Sequence[str]
    metadata: Mapping[str, Any]
    captioned: bool = False

    def finish(self, out: Path) -> str:
        """Writes the prompts beside the token file ``out``; what to say of the labels."""
        from softdimo_fast.data.prompts import PromptFile

        if not self.captioned:
            return f"of {len(self.names)} classes"
        path = out.with_name(f"{out.name}.prompts.txt")
        PromptFile.write(path, self.names)
        return f"with {len(self.names)} prompts ({path})"


def run(
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")],
    tokenizer: str,
    out: Path,
    captions: CaptionFile = None,
    caption_key: str = "text",
    size: int = 256,
    batch_size: int = 32,
    flip: bool = False,
    bad_share: float = 0.001,
    workers: int = 4,
    device: DeviceName = None,
    family: str | None = None,
    revision: str | None = None,
) -> int:
    """Encodes the images of a folder with one subfolder per class, or with captions.

    With captions, the different ones become a file of prompts beside the token file, OUT.prompts.txt, and
    labels number them from 0: what a text-to-image GAN takes as text.prompts and real_tokens.

    Images are made square as in guided diffusion (ADM), whose statistics FID is measured against: halved
    with a box filter while the shorter side is at least twice the size, resized bicubically (antialiased) to
    the size, cut at the centre. Nothing has the name of the file before all is done; a run that was stopped
    begins anew.

    Args:
        folder: of class folders, counted in sorted order, with images at any depth; with captions, where
            the images' names start from.
        tokenizer: a model file or folder, or a hub id owner/name[/path] (see softdimo export).
        out: the token file to make (.sdt); images that could not be read are listed beside it.
        captions: a metadata.jsonl as Hugging Face's imagefolder has it: one JSON object a line, with the
            image's "file_name" and its "text". An image may stand in several lines.
        caption_key: the name that captions have there, if not "text".
        size: height and width of the images.
        batch_size: images that are encoded at a time.
        flip: store the mirror image behind each image too.
        bad_share: of all images, how many may be unreadable.
        workers: threads that read images.
        device: that encodes.
        family: of a published tokenizer file, if its keys should not tell.
        revision: of a hub repository: a commit.
    """
    _require_range(1, None, size=size, batch_size=batch_size, workers=workers)
    _require_range(0, 1, bad_share=bad_share)
    _require_pillow()
    found = (
        find_images(folder) if captions is None else captioned_images(folder, captions, caption_key)
    )
    require_folder("--out: its parent", out.parent)
    model = _load_tokenizer(tokenizer, family, revision)
    skipped = _Skipped(len(found.images), bad_share)
    count, labels = _encode_all(
        model.to(_device(device)), found, skipped, out,
        size=size, batch_size=batch_size, flip=flip, workers=workers,
        metadata={"tokenizer": str(tokenizer), "size": size, "flip": flip},
    )  # fmt: skip
    print(f"{count} images {labels} in {out}{skipped.report(out)}")
    return 0


def _require_range(minimum: float, maximum: float | None, **options: float) -> None:
    from softdimo_fast import _config

    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        _config.require_range("", option, value, minimum=minimum, maximum=maximum)


def _load_tokenizer(source: str, family: str | None, revision: str | None) -> Any:
    from softdimo_fast.models import from_pretrained
    from softdimo_fast.models.protocol import Tokenizer

    model = from_pretrained(source, family=family, revision=revision)
    if not isinstance(model, Tokenizer):
        raise UsageError(
            f"--tokenizer must be a tokenizer, got a {type(model).__name__} in {source}"
        )
    return model


def find_images(folder: Path) -> ImageFiles:
    """The class folders' names in sorted order, and the images in sorted order.

    Raises:
        UsageError: there is no class folder, or one holds no image.
    """
    if not folder.is_dir():
        raise UsageError(f"FOLDER must be a folder with one subfolder per class, got {folder}")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise UsageError(f"FOLDER must hold one subfolder per class, {folder} holds none")
    images: list[ImageFile] = []
    for label, name in enumerate(classes):
        found = sorted(
            path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES
        )
        if not found:
            raise UsageError(f"{folder / name} holds no image ({', '.join(SUFFIXES)})")
        images += [ImageFile(path, label) for path in found]
    return ImageFiles(images, classes, {"class_names": classes})


def captioned_images(folder: Path, path: Path, key: str) -> ImageFiles:
    """The images of a file of captions, in its order. One that is not there is one that cannot be read.

    Raises:
        UsageError: there is no folder or no such file, or a line of it is not as it should be.
    """
    from softdimo_fast.data.captions import Captions
    from softdimo_fast.data.prompts import prompts_digest
    from softdimo_fast.data.token_file import PROMPTS_DIGEST

    if not folder.is_dir():
        raise UsageError(f"FOLDER must be the folder that captions name images in, got {folder}")
    if not path.is_file():
        raise UsageError(f"--captions must be a file, one JSON object a line, got {path}")
    try:
        captions = Captions.read(path, text=key)
    except ValueError as error:
        raise UsageError(f"--captions: {error}") from error
    images = [
        ImageFile(folder / name, prompt, told=f"{path}, line {line}")
        for line, name, prompt in captions.lines
    ]
    metadata = {"captions": str(path), PROMPTS_DIGEST: prompts_digest(captions.prompts)}
    return ImageFiles(images, captions.prompts, metadata, captioned=True)


def load_image(path: Path, size: int) -> Any:
    """One image, float32 ``[3, size, size]`` in [-1, 1].

    ADM's centre crop (``center_crop_arr`` of guided diffusion): the box filter halves first because it is
    what the published statistics were made with; Pillow's bicubic filter is antialiased.

    Raises:
        OSError, ValueError, ...: Pillow cannot read it.
    """
    import numpy as np
    import torch
    from PIL import Image

    with Image.open(path) as file:
        image = file.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)


class _Skipped:
    """Images that could not be read, and how many may be."""

    def __init__(self, total: int, share: float) -> None:
        self._total, self._share = total, share
        self._lines: list[str] = []

    def add(self, image: ImageFile, error: BaseException) -> None:
        """Raises UsageError when there are too many."""
        name = f"{image.path} ({image.told})" if image.told else f"{image.path}"
        self._lines.append(f"{name}: {type(error).__name__}: {error}".replace("\n", " "))
        if len(self._lines) > self._share * self._total:
            listed = "".join(f"\n  {line}" for line in self._lines[:SHOWN])
            raise UsageError(
                f"{len(self._lines)} of {self._total} images cannot be read, more than --bad-share "
                f"{self._share:g} allows; the first are{listed}"
            )

    def report(self, out: Path) -> str:
        """Lists them beside ``out``; what to say of them."""
        from softdimo_fast._files import write_atomically

        path = out.with_name(f"{out.name}.skipped.txt")
        if not self._lines:
            path.unlink(missing_ok=True)  # of an earlier run
            return ""
        write_atomically(path, "".join(f"{line}\n" for line in self._lines).encode())
        return f"; {len(self._lines)} that cannot be read are listed in {path}"


def _encode_all(
    model: Any, found: ImageFiles, skipped: _Skipped, out: Path, *, size: int, batch_size: int,
    flip: bool, workers: int, metadata: dict[str, Any],
) -> tuple[int, str]:  # fmt: skip
    """How many images the finished file holds, and what to say of their labels."""
    import torch

    from softdimo_fast.data.token_file import TokenFileWriter
    from softdimo_fast.trainers.progress import TerminalProgress

    device = next(model.parameters()).device
    token_shape = _token_shape(model, size, device)
    batches = -(-len(found.images) // batch_size)
    progress = TerminalProgress(batches, "pretokenize", stream=sys.stderr)
    try:
        with TokenFileWriter(
            out, vocabulary=model.codebook.shape[-2], token_shape=token_shape,
            classes=len(found.names), metadata=metadata | dict(found.metadata),
        ) as writer, torch.no_grad():  # fmt: skip
            for step, (pixels, labels) in enumerate(
                _batches(found.images, skipped, size, batch_size, workers), start=1
            ):
                if len(labels):
                    pixels = pixels.to(device)
                    if flip:  # each image, then its mirror
                        pixels = torch.stack([pixels, pixels.flip(-1)], dim=1).flatten(0, 1)
                        labels = labels.repeat_interleave(2)
                    writer.append(model.encode(pixels), labels)
                progress.update(step)
            # Before the token file has its name: where there are tokens, their prompts are.
            return writer.count, found.finish(out)
    finally:
        progress.close()


def _token_shape(model: Any, size: int, device: Any) -> tuple[int, ...]:
    """Of one image; a size that the tokenizer does not take is told before any work."""
    import torch

    try:
        with torch.no_grad():
            probe = model.encode(torch.zeros(1, 3, size, size, device=device))
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"the tokenizer does not take images of --size {size}: {error}") from error
    shape = tuple(probe.shape[1:])
    if shape != tuple(model.token_shape):  # right for a model of other images, else a wrong --size
        print(
            f"softdimo: warning: --size {size} makes tokens {list(shape)} of an image; the tokenizer's "
            f"config says {list(model.token_shape)}",
            file=sys.stderr,
        )
    return shape


def _batches(
    images: Sequence[ImageFile], skipped: _Skipped, size: int, batch_size: int, workers: int
) -> Iterator[tuple[Any, Any]]:
    """Pixels ``[B, 3, size, size]`` and labels ``[B]``; the next batch is read while one is encoded."""
    import torch

    def read(image: ImageFile) -> Any:
        try:
            return load_image(image.path, size)
        except Exception as error:  # Pillow's plug-ins raise whatever they meet in a broken file
            return error

    pool = ThreadPoolExecutor(workers)
    try:
        starts = range(0, len(images), batch_size)
        waiting = [pool.submit(read, image) for image in images[:batch_size]]
        for start in starts:
            current, following = waiting, images[start + batch_size : start + 2 * batch_size]
            waiting = [pool.submit(read, image) for image in following]
            pixels, labels = [], []
            for image, future in zip(images[start : start + batch_size], current, strict=True):
                found = future.result()
                if isinstance(found, Exception):
                    skipped.add(image, found)
                else:
                    pixels.append(found)
                    labels.append(image.label)
            yield torch.stack(pixels) if pixels else torch.empty(0), torch.tensor(labels)
    finally:
        pool.shutdown(cancel_futures=True)


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device must be one that torch has here, got {name}: {error}"
        ) from error
    return device


def _require_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'images are read with pillow: pip install "softdimo-fast[data]"'
        ) from error
