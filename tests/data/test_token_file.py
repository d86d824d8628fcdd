"""Token files: what is written is what is read, damage is named, and no half a file has the final name."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.checks import assert_same_bits
from torch import Tensor

from softdimo_fast.data._token_header import MAGIC, PREFIX, VERSION
from softdimo_fast.data.source import TokenSource
from softdimo_fast.data.token_file import TokenFile, TokenFileError, TokenFileWriter
from softdimo_fast.diffusion import Draws

COUNT, SHAPE, VOCABULARY, CLASSES = 21, (4, 3), 1000, 5


def samples(vocabulary: int = VOCABULARY, count: int = COUNT) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (count, *SHAPE), generator=generator)
    return tokens, torch.randint(CLASSES, (count,), generator=generator)


def writer(path: Path, **options: Any) -> TokenFileWriter:
    return TokenFileWriter(
        path,
        **({"vocabulary": VOCABULARY, "token_shape": SHAPE, "classes": CLASSES} | options),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "tokens.sdt"
    tokens, labels = samples()
    with writer(file, metadata={"classes": ["a", "b"]}) as out:
        for first in range(0, COUNT, 8):
            out.append(tokens[first : first + 8], labels[first : first + 8])
        assert out.count == COUNT
        assert not file.exists()
    return file


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# ---------------------------------------------------------------------------------------------------
# reading what was written


def test_what_was_written_is_read(path: Path) -> None:
    file = TokenFile.open(path)
    header = file.header
    assert (header.vocabulary, header.token_shape, header.count) == (VOCABULARY, SHAPE, COUNT)
    assert (header.dtype, header.classes, header.metadata) == (
        "uint16", CLASSES, {"classes": ["a", "b"]},
    )  # fmt: skip
    assert len(file) == COUNT
    assert files(path.parent) == [path.name]
    index = torch.tensor([20, 0, 7, 7])
    tokens, labels = samples()
    for found, expected in zip(file.rows(index), (tokens[index], labels[index]), strict=True):
        assert_same_bits(found, expected)


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32")],
)
def test_the_smallest_dtype_that_holds_the_vocabulary(
    tmp_path: Path, vocabulary: int, dtype: str
) -> None:
    tokens, labels = samples(vocabulary)
    tokens[0, 0, 0] = vocabulary - 1
    with writer(tmp_path / "t.sdt", vocabulary=vocabulary) as out:
        out.append(tokens, labels)
    file = TokenFile.open(tmp_path / "t.sdt")
    assert file.header.dtype == dtype
    assert_same_bits(file.rows(torch.arange(COUNT))[0], tokens)


def test_a_file_without_images(tmp_path: Path) -> None:
    writer(tmp_path / "t.sdt").finish()
    file = TokenFile.open(tmp_path / "t.sdt")
    assert len(file) == 0
    with pytest.raises(ValueError, match=r"t\.sdt holds no image"):
        file.source(8)


def test_the_source_gives_what_the_source_in_memory_gives(path: Path) -> None:
    source, memory = TokenFile.open(path).source(8), TokenSource(*samples(), 8)
    for step in range(6):  # two epochs
        for draws in (Draws.of(3, step, 8), Draws.of(3, step, 3, first=4)):
            for found, expected in zip(source(draws), memory(draws), strict=True):
                assert_same_bits(found, expected)
    assert source.to(torch.device("cpu")) is source
    with pytest.raises(ValueError, match="batch_size is 8, but a step has at least 9 samples"):
        source(Draws.of(0, 0, 9))


def test_more_than_two_to_the_31_elements(tmp_path: Path) -> None:
    """A file with a hole: it takes a few kilobytes of disk."""
    path, count, length = tmp_path / "large.sdt", 2**23 + 3, 257
    document = {
        "vocabulary": 256, "token_shape": [length], "dtype": "uint8", "count": count, "classes": 7,
        "sha256": "", "metadata": {},
    }  # fmt: skip
    text = json.dumps(document).encode().ljust(4096 - PREFIX.size)
    labels_at = -(-count * length // 64) * 64
    last = np.arange(length, dtype=np.uint8)
    with path.open("wb") as out:
        out.write(PREFIX.pack(MAGIC, VERSION, len(text)) + text)
        out.seek(4096 + (count - 1) * length)
        out.write(last.tobytes())
        out.truncate(4096 + labels_at + 4 * count)
        out.seek(-4, os.SEEK_END)
        out.write(struct.pack("<i", 6))
    assert count * length > 2**31
    file = TokenFile.open(path, verify=False)
    tokens, labels = file.rows(torch.tensor([0, count - 1]))
    assert labels.tolist() == [0, 6]
    assert torch.equal(tokens[0], torch.zeros(length, dtype=torch.int64))
    assert torch.equal(tokens[1], torch.from_numpy(last).long())


# ---------------------------------------------------------------------------------------------------
# damage


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        TokenFile.open(tmp_path / "none")


@pytest.mark.parametrize("content", [b"", b"SDTOK", b"PNG" * 2000])
def test_another_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(TokenFileError, match="t is no token file"):
        TokenFile.open(tmp_path / "t")


def test_another_version(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8] = 2
    path.write_bytes(data)
    with pytest.raises(TokenFileError, match=r"is a token file of version 2; .* reads 1"):
        TokenFile.open(path)


@pytest.mark.parametrize("change", [-1, 1])
def test_another_size(path: Path, change: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] if change < 0 else data + b"x")
    with pytest.raises(TokenFileError, match=f"21 images must make {len(data)} bytes, it has"):
        TokenFile.open(path, verify=False)


@pytest.mark.parametrize("offset", [4096, 4096 + 100, -1])
def test_one_changed_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    TokenFile.open(path, verify=False)
    with pytest.raises(TokenFileError, match="sha256 of its tokens and labels is"):
        TokenFile.open(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"vocabulary": 1000', b'"vocabulary": -1  ', "vocabulary must be a number"),
        (b'"vocabulary"', b'"vocabulari"', "it has no vocabulary"),
        (b'"uint16"', b'"uint8" ', "dtype must be one that holds 1000 codes"),
        (b"[4, 3]", b'"4,3" ', "token_shape"),
        (b"{", b"?", "Expecting value"),
    ],
)
def test_a_damaged_header(path: Path, old: bytes, new: bytes, message: str) -> None:
    data = path.read_bytes()
    assert data.count(old) >= 1
    path.write_bytes(data.replace(old, new, 1))
    with pytest.raises(TokenFileError, match=message):
        TokenFile.open(path)


def test_a_token_out_of_range_where_nothing_was_verified(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:4098] = struct.pack("<H", VOCABULARY)
    path.write_bytes(data)
    file = TokenFile.open(path, verify=False)
    file.rows(torch.tensor([1]))
    with pytest.raises(TokenFileError, match=r"tokens must be 0 \.\. 999, got"):
        file.rows(torch.tensor([0]))


# ---------------------------------------------------------------------------------------------------
# writing


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with writer(tmp_path / "t.sdt") as out:
            out.append(*samples())
            assert files(tmp_path) == [".t.sdt.unfinished"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert files(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = writer(tmp_path / "t.sdt")
    out.append(*samples())
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            out.finish()
    assert files(tmp_path) == []
    out = writer(tmp_path / "t.sdt")
    monkeypatch.setattr(out, "_file", SimpleNamespace(write=full, close=out._file.close))
    with pytest.raises(OSError, match=r"No space left on device: .*t\.sdt"), out:
        out.append(*samples())
    assert files(tmp_path) == []


def test_what_a_killed_writer_left_is_overwritten(path: Path) -> None:
    whole, left = path.read_bytes(), path.with_name(f".{path.name}.unfinished")
    left.write_bytes(whole * 2)
    tokens, labels = samples()
    with writer(path) as out:
        out.append(tokens[:2], labels[:2])
        assert path.read_bytes() == whole
    assert len(TokenFile.open(path)) == 2
    assert not left.exists()


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    with writer(tmp_path / "t.sdt") as out:
        with pytest.raises(OSError, match="another process is writing"):
            writer(tmp_path / "t.sdt")
        out.append(*samples())
    assert len(TokenFile.open(tmp_path / "t.sdt")) == COUNT


@pytest.mark.parametrize(
    ("tokens", "labels", "message"),
    [
        (torch.full((1, *SHAPE), VOCABULARY), torch.zeros(1).long(), r"tokens must be 0 \.\. 999"),
        (torch.full((1, *SHAPE), -1), torch.zeros(1).long(), r"tokens must be .* got -1 \.\. -1"),
        (torch.zeros(1, *SHAPE).long(), torch.tensor([5]), r"labels must be 0 \.\. 4"),
        (torch.zeros(1, 12).long(), torch.zeros(1).long(), r"tokens must have shape \[1, 4, 3\]"),
        (torch.zeros(2, *SHAPE).long(), torch.zeros(1).long(), r"labels must have shape \[2\]"),
        (torch.zeros(1, *SHAPE), torch.zeros(1).long(), "tokens must be integers"),
    ],
)
def test_a_wrong_batch_is_refused_whole(
    tmp_path: Path, tokens: Tensor, labels: Tensor, message: str
) -> None:
    with writer(tmp_path / "t.sdt") as out:
        with pytest.raises((TypeError, ValueError), match=message):
            out.append(tokens, labels)
        out.append(*samples())
    assert len(TokenFile.open(tmp_path / "t.sdt")) == COUNT
    with pytest.raises(ValueError, match="is finished"):
        out.append(*samples())


@pytest.mark.parametrize(
    "options", [{"vocabulary": 0}, {"token_shape": ()}, {"token_shape": (0,)}, {"classes": 0}]
)
def test_wrong_sizes(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        writer(tmp_path / "t.sdt", **options)
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        writer(tmp_path / "none" / "t.sdt")
