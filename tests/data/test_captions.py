"""metadata.jsonl: captions of images, and the prompts that they are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from softdimo_fast.data.captions import Captions
from softdimo_fast.data.prompts import PromptFile, prompts_digest


def written(path: Path, *entries: Any) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_equal_captions_are_one_prompt(tmp_path: Path) -> None:
    path = written(
        tmp_path / "metadata.jsonl",
        {"file_name": "b.png", "text": "a cat", "width": 3},
        {"file_name": "deeper/a.jpg", "text": " two\nboats\t at\u2028sea "},
        {"text": "naïve café", "file_name": "b.png"},
        {"file_name": "c.png", "text": "a  cat"},
    )
    captions = Captions.read(path)
    assert captions.path == path
    assert captions.prompts == ["a cat", "two boats at sea", "naïve café"]
    assert captions.lines == [
        (1, "b.png", 0), (2, "deeper/a.jpg", 1), (3, "b.png", 2), (4, "c.png", 0),
    ]  # fmt: skip


def test_empty_lines_byte_order_marks_and_another_key(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    lines = [
        "",
        '{"file_name": "a", "caption": "\ufeffone"}',
        "  ",
        '{"file_name": "b", "caption": "two"}',
    ]
    path.write_bytes("\ufeff".encode() + "\r\n".join(lines[1:]).encode())
    captions = Captions.read(path, text="caption")
    assert captions.prompts == ["one", "two"]
    assert [line.line for line in captions.lines] == [1, 3]


def test_the_prompts_file_holds_them_all(tmp_path: Path) -> None:
    """Whatever a caption holds, line i + 1 is prompt i."""
    texts = ["a\r\nb", "\ufeffmark", "x\x0by", "tab\tbed", "日本", 'quo"te', "e\u0301"]
    path = written(tmp_path / "m.jsonl", *({"file_name": "a", "text": text} for text in texts))
    prompts = Captions.read(path).prompts
    made = PromptFile.write(tmp_path / "prompts.txt", prompts)
    assert list(made) == list(PromptFile(tmp_path / "prompts.txt")) == prompts
    assert len(prompts) == len(texts)
    assert prompts_digest(made) == prompts_digest(prompts) != prompts_digest(prompts[::-1])
    assert prompts_digest(["a b"]) != prompts_digest(["a", "b"])
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


GOOD = b'{"file_name": "a.png", "text": "a"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"a.png a cat", "line 2: a line must be a JSON object with 'file_name' and 'text', got no JSON"),
        (b'["a.png"]', "line 2: a line must be a JSON object with 'file_name' and 'text', got [\"a.png\"]"),
        (b"{}", "line 2: a line must be a JSON object with 'file_name' and 'text', got one with nothing"),
        (b'{"file_name": "a", "caption": "c"}', "'text', got one with 'file_name', 'caption'"),
        (b'{"text": "a"}', "line 2: a line must be a JSON object with 'file_name'"),
        (b'{"file_name": "a", "text": ["c"]}', "line 2: 'text' must be a string, got ['c']"),
        (b'{"file_name": 7, "text": "c"}', "line 2: 'file_name' must be a string, got 7"),
        (b'{"file_name": "a", "text": " \\n"}', "line 2: 'text' must not be empty"),
        (b'{"file_name": "", "text": "c"}', "line 2: 'file_name' must be a path within the folder"),
        (b'{"file_name": "/a", "text": "c"}', "'file_name' must be a path within the folder of images"),
        (b'{"file_name": "../a", "text": "c"}', "'file_name' must be a path within the folder"),
        (b'{"file_name": "a", "text": "c\xff"}', "line 2: captions must be UTF-8 (invalid start byte)"),
        (b'{"file_name": "a", "text": "c\\ud800"}', "line 2: 'text' must be text (surrogates not allowed)"),
    ],
)  # fmt: skip
def test_lines_that_are_refused(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        Captions.read(path)
    assert str(refused.value).startswith(f"{path}, line 2: ")


def test_no_caption_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(
        ValueError, match="empty holds no caption: it must have one JSON object a line"
    ):
        Captions.read(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="none"):
        Captions.read(tmp_path / "none")
