"""Encoded images in one file that is mapped into memory: training reads tokens, and decodes no image.

    bytes 0-7       magic, b"SDTOKENS"
    bytes 8-15      two little-endian uint32: version, length of the header
    then            the header: JSON in UTF-8, padded with spaces up to a multiple of 4096 bytes
    then            tokens, [count, *token_shape], little-endian, the smallest of uint8, uint16 and int32
    then            labels, int32 [count], after zeros up to a multiple of 64

The header's ``sha256`` is that of everything behind the header.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softdimo_fast.data._token_header import (
    DTYPES,
    LABEL,
    PREFIX,
    TokenFileError,
    TokenHeader,
    header_bytes,
    read_header,
)
from softdimo_fast.data.source import step_rows
from softdimo_fast.diffusion.draws import Draws, send

__all__ = ["TokenFile", "TokenFileError", "TokenFileSource", "TokenFileWriter", "TokenHeader"]

CHUNK = 1 << 24  # read at a time for the digest
# In the metadata of a file whose labels are numbers of prompts: what ``prompts_digest`` says of them.
PROMPTS_DIGEST = "prompts_sha256"
UNKNOWN_DIGEST = "0" * 64


class TokenFileWriter:
    """Writes a token file batch by batch; nothing has the final name before all of it is on the disk.

    ::

        with TokenFileWriter("tokens.sdt", vocabulary=1024, token_shape=(256,), classes=1000) as writer:
            for images, labels in batches:
                writer.append(tokenizer.encode(images), labels)

    Leaving the block through an exception removes what was written. What a killed process leaves
    (``.NAME.unfinished``) is overwritten by the next writer.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        vocabulary: int,
        token_shape: Sequence[int],
        classes: int,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            path: of the finished file; one that exists is replaced when this one is finished.
            vocabulary: V, at most 2^31.
            token_shape: of one image.
            classes: labels are 0 .. classes - 1.
            metadata: kept in the header, as JSON.

        Raises:
            ValueError: a number is out of range.
            TypeError: ``metadata`` is no JSON.
            OSError: the file cannot be made, or another process is writing it.
        """
        if not 1 <= vocabulary <= max(DTYPES.values()):
            raise ValueError(
                f"TokenFileWriter: vocabulary must be 1 .. {max(DTYPES.values())}, got {vocabulary}"
            )
        if not token_shape or any(n < 1 for n in token_shape):
            raise ValueError(
                f"TokenFileWriter: token_shape must be positive numbers, got {token_shape}"
            )
        if not 1 <= classes <= 2**31 - 1:
            raise ValueError(f"TokenFileWriter: classes must be 1 .. 2^31 - 1, got {classes}")
        self.path = Path(path)
        dtype = next(name for name, most in DTYPES.items() if vocabulary <= most)
        self._header = TokenHeader(
            vocabulary, tuple(token_shape), dtype, 0, classes, UNKNOWN_DIGEST, dict(metadata or {})
        )
        # The numbers of the finished header must fit where this one is written.
        self._room = len(header_bytes(self._header, count=2**63)) - PREFIX.size
        self._digest, self._labels, self._closed = hashlib.sha256(), list[NDArray[Any]](), False
        self._unfinished = self.path.with_name(f".{self.path.name}.unfinished")
        self._file = _locked(self._unfinished)
        self._file.write(bytes(PREFIX.size + self._room))

    @property
    def count(self) -> int:
        """Images so far."""
        return sum(len(labels) for labels in self._labels)

    def append(self, tokens: Tensor, labels: Tensor) -> None:
        """Some images more.

        Args:
            tokens: integers ``[B, *token_shape]``, 0 .. vocabulary - 1, on any device.
            labels: integers ``[B]``, 0 .. classes - 1.

        Raises:
            TypeError, ValueError: they have another dtype or shape, or a value out of range; nothing of the
                batch is written.
            OSError: the disk is full.
        """
        header = self._header
        if self._closed:
            raise ValueError(f"TokenFileWriter: {self.path} is finished")
        self._check("tokens", tokens, (len(tokens), *header.token_shape), header.vocabulary)
        self._check("labels", labels, (len(tokens),), header.classes)
        self._write(tokens.cpu().numpy().astype(header.stored).tobytes())
        self._labels.append(labels.cpu().numpy().astype(LABEL))

    def finish(self) -> TokenHeader:
        """Writes what is left, brings the file to the disk and gives it its name.

        Raises:
            OSError: it could not be written; nothing is left behind.
        """
        try:
            labels = np.concatenate([np.empty(0, LABEL), *self._labels])
            header = replace(self._header, count=len(labels))
            self._write(bytes(header.labels_offset - header.tokens_size))
            self._write(labels.tobytes())
            header = replace(header, sha256=self._digest.hexdigest())
            self._file.seek(0)
            self._file.write(header_bytes(header, room=self._room))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._unfinished.replace(self.path)
        except BaseException:
            self.discard()
            raise
        self._closed = True
        self._file.close()
        return header

    def discard(self) -> None:
        """Removes what was written. After :meth:`finish`, does nothing."""
        if not self._closed:
            self._closed = True
            self._unfinished.unlink(missing_ok=True)  # before the lock goes
            with suppress(OSError):  # a full disk takes what is still buffered no better
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.discard()
        elif not self._closed:
            self.finish()

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._digest.update(data)

    def _check(self, name: str, values: Tensor, shape: tuple[int, ...], high: int) -> None:
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"TokenFileWriter: {name} must be integers, got {values.dtype}")
        if tuple(values.shape) != shape:
            raise ValueError(
                f"TokenFileWriter: {name} must have shape {list(shape)}, got {list(values.shape)}"
            )
        if values.numel():
            low, top = (int(value) for value in torch.aminmax(values))
            if low < 0 or top >= high:
                raise ValueError(
                    f"TokenFileWriter: {name} must be 0 .. {high - 1}, got {low} .. {top} in the images "
                    f"from number {self.count} on"
                )


class TokenFile:
    """A token file, open for reading; make one with :meth:`open`.

    Attributes:
        path: where it is.
        header: what it says of itself.
    """

    def __init__(
        self, path: Path, header: TokenHeader, tokens: NDArray[Any], labels: NDArray[Any]
    ) -> None:
        self.path, self.header = path, header
        self._tokens, self._labels = tokens, labels

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> TokenFile:
        """Maps a file; nothing is read before it is asked for, unless ``verify``.

        Args:
            path: of the file.
            verify: read all of it once and compare its digest. Its size is compared in any case.

        Raises:
            FileNotFoundError: there is none.
            TokenFileError: it is no token file, of another version, of the wrong size, or damaged.
        """
        path = Path(path)
        with path.open("rb") as file:
            header, start = read_header(path, file)
            size = os.fstat(file.fileno()).st_size
            if size != start + header.payload:
                raise TokenFileError(
                    f"{path} is damaged: {header.count} images must make {start + header.payload} bytes, "
                    f"it has {size}"
                )
            if verify:
                _verify(path, file, start, header)
        # The system maps no empty range.
        size = header.payload
        data: NDArray[Any] = (
            np.memmap(path, np.uint8, "r", start, (size,)) if size else np.empty(0, np.uint8)
        )
        data = np.asarray(data)
        tokens = data[: header.tokens_size].view(header.stored)
        tokens = tokens.reshape(header.count, *header.token_shape)
        labels = data[header.labels_offset :].view(LABEL)
        return cls(path, header, tokens, labels)

    def __len__(self) -> int:
        return self.header.count

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 ``[B, *token_shape]`` and labels int64 ``[B]`` of images ``index``, int64 ``[B]``.

        Raises:
            TokenFileError: a token or a label is out of range: the file was damaged after it was opened, or
                was opened without verifying it.
        """
        chosen = index.numpy()
        tokens = torch.from_numpy(self._tokens[chosen].astype(np.int64))
        labels = torch.from_numpy(self._labels[chosen].astype(np.int64))
        self._require("token", tokens, self.header.vocabulary)
        self._require("label", labels, self.header.classes)
        return tokens, labels

    def source(self, batch_size: int) -> TokenFileSource:
        """Samples for a trainer whose global batch has ``batch_size`` of them.

        Raises:
            ValueError: the file holds no image.
        """
        if not len(self):
            raise ValueError(f"TokenFile.source: {self.path} holds no image")
        return TokenFileSource(self, batch_size)

    def _require(self, name: str, values: Tensor, high: int) -> None:
        # On the CPU, a thousand times cheaper than the step; on a GPU it would end the process in an assert.
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < high:
            raise TokenFileError(
                f"{self.path} is damaged: {name}s must be 0 .. {high - 1}, got "
                f"{int(values.min())} .. {int(values.max())}"
            )


@dataclass(frozen=True)
class TokenFileSource:
    """The counterpart of :class:`~softdimo_fast.data.source.TokenSource` that reads its rows from the disk.

    Both visit the images in the same order. The first call of an epoch makes its permutation, which takes
    0.65 s for 1.28 million images.

    Attributes:
        file: open.
        batch_size: the global one.
    """

    file: TokenFile
    batch_size: int

    def __call__(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, *token_shape]`` and labels ``[B]``, int64, on the draws' device."""
        tokens, labels = self.file.rows(step_rows(draws, self.batch_size, len(self.file)))
        device = draws.samples.device
        return send(tokens, device), send(labels, device)

    def to(self, device: torch.device) -> TokenFileSource:
        """Itself: samples go where the draws are."""
        return self


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk


def _verify(path: Path, file: BinaryIO, start: int, header: TokenHeader) -> None:
    file.seek(start)
    digest = hashlib.sha256()
    for chunk in _chunks(file):
        digest.update(chunk)
    if digest.hexdigest() != header.sha256:
        raise TokenFileError(
            f"{path} is damaged: the sha256 of its tokens and labels is {digest.hexdigest()}, the header "
            f"says {header.sha256}"
        )


def _locked(path: Path) -> BinaryIO:
    """``path``, empty, open for writing by this process alone."""
    # Not truncated before it is locked: it may be another process's.
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise OSError(
            error.errno, "another process is writing this token file", str(path)
        ) from None
    file.truncate()
    return file
