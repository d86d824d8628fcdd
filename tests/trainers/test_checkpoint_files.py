"""No damage to the files of a checkpoint goes unnoticed, and none ends in another error than ours."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import save, weight

from softdimo_fast.trainers.checkpoint import CheckpointError, CheckpointWarning, load


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest and makes its own digest right again, as an attacker would."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["digest"]
    change(manifest)
    text = json.dumps(manifest, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    file.write_text(json.dumps({**manifest, "digest": digest}))


def replace_file(path: Path, name: str, content: bytes) -> None:
    """Puts another content under a name, with a manifest that vouches for it."""
    (path / name).write_bytes(content)
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite_manifest(path, lambda manifest: manifest["files"].update({name: entry}))


def flip_bit(path: Path, position: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def truncate(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit in the tensors": (
        lambda path: flip_bit(path / "model.safetensors", 0.9),
        r"model\.safetensors is not what was written: its sha256 differs",
    ),
    "flipped bit in the header": (
        lambda path: flip_bit(path / "model.safetensors", 0.0),
        r"model\.safetensors is not what was written",
    ),
    "flipped bit in the manifest": (
        lambda path: flip_bit(path / "manifest.json", 0.5),
        r"manifest\.json is (not what was written|malformed)",
    ),
    "flipped bit in the state": (
        lambda path: flip_bit(path / "state.json", 0.5),
        r"state\.json is not what was written",
    ),
    "truncated": (
        lambda path: truncate(path / "model.safetensors", 0.5),
        r"model\.safetensors has [0-9]+ bytes, [0-9]+ were written",
    ),
    "empty": (lambda path: truncate(path / "config.json", 0), r"config\.json has 0 bytes"),
    "missing tensors": (
        lambda path: (path / "model.safetensors").unlink(),
        r"model\.safetensors: No such file",
    ),
    "missing manifest": (
        lambda path: (path / "manifest.json").unlink(),
        r"manifest\.json: No such file",
    ),
    "truncated manifest": (
        lambda path: truncate(path / "manifest.json", 0.7),
        r"manifest\.json is malformed",
    ),
    "not UTF-8": (
        lambda path: (path / "manifest.json").write_bytes(b'{"\xff": 1}'),
        r"manifest\.json is malformed",
    ),
    "a list": (
        lambda path: (path / "manifest.json").write_text("[]"),
        r"manifest\.json is malformed: no object",
    ),
    "NaN": (
        lambda path: (path / "manifest.json").write_text('{"step": NaN}'),
        r"manifest\.json is malformed: NaN is not JSON",
    ),
    "endless digits": (
        lambda path: (path / "manifest.json").write_text('{"step": ' + "9" * 10_000 + "}"),
        r"manifest\.json is malformed",
    ),
    "endless nesting": (
        lambda path: (path / "manifest.json").write_text('{"a":' * 100_000),
        r"manifest\.json is malformed",
    ),
    "deep nesting": (
        lambda path: (path / "manifest.json").write_text(
            '{"format": 1, "a": ' + "[" * 900 + "]" * 900 + "}"
        ),
        r"manifest\.json is (malformed|not what was written)",
    ),
    "a folder for a file": (
        lambda path: ((path / "state.json").unlink(), (path / "state.json").mkdir()),
        r"state\.json is no regular file",
    ),
    "a pipe for a file": (
        lambda path: ((path / "state.json").unlink(), os.mkfifo(path / "state.json")),
        r"state\.json is no regular file",
    ),
    "a link for a file": (
        lambda path: (
            (path / "state.json").unlink(),
            (path / "state.json").symlink_to("/etc/passwd"),
        ),
        r"state\.json is no regular file",
    ),
    "a file for the folder": (
        lambda path: (shutil.rmtree(path), path.write_text("x")),
        r"manifest\.json: Not a directory",
    ),
    "a later format": (
        lambda path: rewrite_manifest(path, lambda m: m.update(format=2)),
        r"manifest\.json has format 2, this version reads 1",
    ),
    "another step": (
        lambda path: rewrite_manifest(path, lambda m: m.update(step=100)),
        r"manifest\.json is not what was written",
    ),
    "no files": (
        lambda path: rewrite_manifest(path, lambda m: m.update(files=[])),
        r"does not list state\.json and config\.json",
    ),
    "state not listed": (
        lambda path: rewrite_manifest(path, lambda m: m["files"].pop("state.json")),
        r"does not list state\.json and config\.json",
    ),
    "a file outside": (
        lambda path: rewrite_manifest(
            path,
            lambda m: m["files"].update(
                {"../step_00000100/model.safetensors": m["files"]["model.safetensors"]}
            ),
        ),
        r"lists '\.\./step_00000100/model\.safetensors', which is no file of a checkpoint",
    ),
    "an absolute file": (
        lambda path: rewrite_manifest(
            path, lambda m: m["files"].update({"/etc/passwd": {"size": 1, "sha256": ""}})
        ),
        r"lists '/etc/passwd'",
    ),
    "no size": (
        lambda path: rewrite_manifest(path, lambda m: m["files"].update({"state.json": None})),
        r"lists 'state\.json'",
    ),
    "tensors that are none": (
        lambda path: replace_file(path, "model.safetensors", b'\x08\0\0\0\0\0\0\0{"a":12}'),
        r"model\.safetensors: SafetensorError",
    ),
    "a pickle": (
        lambda path: replace_file(path, "model.safetensors", b"\x80\x04cos\nsystem\n."),
        r"model\.safetensors: SafetensorError",
    ),
    "state that is no object": (
        lambda path: replace_file(path, "state.json", b"3"),
        r"state\.json is malformed: no object",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_loudly(folder: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(folder / "step_00000200")
    with pytest.warns(CheckpointWarning, match=message) as caught:
        loaded = load(folder)
    assert "step_00000100 is used:" in str(caught[0].message)
    assert (loaded.step, weight(loaded)) == (100, 100)
    with pytest.raises(CheckpointError, match=message):
        load(folder, step=200)
    damage(folder / "step_00000100") if name != "another step" else shutil.rmtree(
        folder / "step_00000100"
    )
    with pytest.raises(CheckpointError, match="no usable checkpoint:\n"):
        load(folder)


@given(position=st.floats(0, 1), file=st.sampled_from(["model.safetensors", "manifest.json"]))
def test_any_flipped_bit_is_found(
    tmp_path_factory: pytest.TempPathFactory, position: float, file: str
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    flip_bit(save(folder, 1) / file, position)
    with pytest.raises(CheckpointError):
        load(folder)


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*there are: none"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load(tmp_path / "missing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load(tmp_path / "file")


def test_latest_that_points_nowhere(folder: Path) -> None:
    (folder / "latest").write_text("step_00000900\n")
    with pytest.warns(CheckpointWarning, match=r"latest names 'step_00000900', which is not there"):
        assert load(folder).step == 200
    (folder / "latest").write_bytes(b"\xff\0")
    assert load(folder).step == 200
    (folder / "latest").unlink()
    assert load(folder).step == 200
