"""Captions of a folder of images: the ``metadata.jsonl`` of Hugging Face's imagefolder data sets.

One JSON object a line, with the image's ``file_name``, relative to the folder, and its caption, ``text``;
what else an object holds is not looked at. An image may stand in several lines, each with its caption.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

FILE_NAME, TEXT = "file_name", "text"


class Caption(NamedTuple):
    """One line of the file.

    Attributes:
        line: its number, counted from 1.
        file_name: of the image.
        prompt: the number of its caption among the prompts.
    """

    line: int
    file_name: str
    prompt: int


@dataclass(frozen=True)
class Captions:
    """The captions of some images.

    Attributes:
        path: of the file they are from.
        prompts: the different captions, in the order in which they first come.
        lines: one for each image and caption, in the order of the file.
    """

    path: Path
    prompts: Sequence[str]
    lines: Sequence[Caption]

    @classmethod
    def read(cls, path: str | Path, *, text: str = TEXT) -> Captions:
        """Reads a file.

        White space within a caption (line feeds too) becomes single spaces, as text encoders read it, so that
        prompts can stand one a line in a file of prompts. Empty lines are no captions.

        Args:
            path: of the file.
            text: the name under which the captions stand.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it holds no caption, or a line is not as it should be; the message names the line.
        """
        numbers: dict[str, int] = {}
        lines: list[Caption] = []
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    name, prompt = _parse(line, text)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
                lines.append(Caption(number, name, numbers.setdefault(prompt, len(numbers))))
        if not lines:
            raise ValueError(f"{path} holds no caption: it must have one JSON object a line")
        return cls(Path(path), list(numbers), lines)


def _parse(line: bytes, text: str) -> tuple[str, str]:
    """File name and caption of a line."""
    expected = f"a line must be a JSON object with {FILE_NAME!r} and {text!r}"
    try:
        entry: Any = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"captions must be UTF-8 ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{expected}, got no JSON ({error})") from error
    if not isinstance(entry, dict):
        raise ValueError(f"{expected}, got {line.decode().strip()[:60]}")
    for key in (FILE_NAME, text):
        if key not in entry:
            raise ValueError(f"{expected}, got one with {', '.join(map(repr, entry)) or 'nothing'}")
        if not isinstance(entry[key], str):
            raise ValueError(f"{key!r} must be a string, got {entry[key]!r}")
    # A byte order mark is no space to split(), and none of a text's words.
    name, caption = entry[FILE_NAME], " ".join(entry[text].replace("\ufeff", " ").split())
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{FILE_NAME!r} must be a path within the folder of images, got {name!r}")
    if not caption:
        raise ValueError(
            f"{text!r} must not be empty (the model would be told what guidance tells it for 'no condition')"
        )
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{text!r} must be text ({error.reason}), got {caption!r}") from error
    return name, caption
