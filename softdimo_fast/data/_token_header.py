"""The first bytes of a token file (see :mod:`softdimo_fast.data.token_file`, which describes the form)."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

MAGIC, VERSION = b"SDTOKENS", 1
PREFIX = struct.Struct("<8sII")
PAGE, ALIGNMENT = 4096, 64
LABEL = np.dtype("<i4")
# In the order of preference, with the most codes that each can hold.
DTYPES = {"uint8": 1 << 8, "uint16": 1 << 16, "int32": 1 << 31}
LARGEST_HEADER = 1 << 24


class TokenFileError(OSError):
    """A token file is damaged, or is none."""


@dataclass(frozen=True)
class TokenHeader:
    """What a token file says of itself.

    Attributes:
        vocabulary: V; tokens are 0 .. V - 1.
        token_shape: of one image.
        dtype: of the stored tokens.
        count: images.
        classes: labels are 0 .. classes - 1.
        sha256: of the payload, in hexadecimal.
        metadata: whatever the writer wanted to be known, as JSON.
    """

    vocabulary: int
    token_shape: tuple[int, ...]
    dtype: str
    count: int
    classes: int
    sha256: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stored(self) -> np.dtype[Any]:
        """The dtype in the file."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def tokens_size(self) -> int:
        """Bytes of all tokens."""
        return self.count * math.prod(self.token_shape) * self.stored.itemsize

    @property
    def labels_offset(self) -> int:
        """From the payload's first byte."""
        return rounded(self.tokens_size, ALIGNMENT)

    @property
    def payload(self) -> int:
        """Bytes behind the header."""
        return self.labels_offset + self.count * LABEL.itemsize

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def of(cls, document: Any) -> TokenHeader:
        """Raises ValueError, naming the field, unless ``document`` is a header's."""
        if not isinstance(document, dict):
            raise ValueError(f"it must be an object, got {document!r}")
        missing = [item.name for item in fields(cls) if item.name not in document]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        shape = document["token_shape"]
        counts = {name: document[name] for name in ("vocabulary", "classes", "count")}
        counts |= {f"token_shape[{i}]": n for i, n in enumerate(shape)}
        for name, value in counts.items():
            if not isinstance(value, int) or value < (name == "vocabulary"):
                raise ValueError(f"{name} must be a number of things, got {value!r}")
        if document["vocabulary"] > DTYPES.get(document["dtype"], 0):
            raise ValueError(
                f"dtype must be one that holds {document['vocabulary']} codes, of "
                f"{', '.join(DTYPES)}, got {document['dtype']!r}"
            )
        known = {item.name: document[item.name] for item in fields(cls)}
        return cls(**(known | {"token_shape": tuple(shape)}))


def rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def header_bytes(
    header: TokenHeader, *, count: int | None = None, room: int | None = None
) -> bytes:
    document = header.document() | ({} if count is None else {"count": count})
    text = json.dumps(document).encode()
    if room is None:
        room = rounded(PREFIX.size + len(text), PAGE) - PREFIX.size
    return PREFIX.pack(MAGIC, VERSION, room) + text.ljust(room)


def read_header(path: Path, file: BinaryIO) -> tuple[TokenHeader, int]:
    """The header, and where the payload begins."""
    prefix = file.read(PREFIX.size)
    if len(prefix) < PREFIX.size or not prefix.startswith(MAGIC):
        raise TokenFileError(f"{path} is no token file: it must begin with {MAGIC!r}")
    _, version, room = PREFIX.unpack(prefix)
    if version != VERSION:
        raise TokenFileError(
            f"{path} is a token file of version {version}; this version of softdimo_fast reads {VERSION}"
        )
    try:
        if room > LARGEST_HEADER:
            raise ValueError(f"its length is {room} bytes")
        return TokenHeader.of(json.loads(file.read(room))), PREFIX.size + room
    except (ValueError, TypeError) as error:
        raise TokenFileError(f"{path} is damaged: its header cannot be read ({error})") from error
