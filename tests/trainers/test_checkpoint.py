"""Checkpoints: exact round trips, what is kept, and what cannot be saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import names, save, weight
from support.checks import assert_same_bits
from torch import nn

from softdimo_fast.trainers import checkpoint
from softdimo_fast.trainers.checkpoint import CheckpointError, find, load

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


# ---- round trips -------------------------------------------------------------------------------------------


def test_round_trip(folder: Path) -> None:
    loaded = load(folder)
    assert loaded.path == folder / "step_00000200"
    assert loaded.step == 200
    assert loaded.state == {"samples": 12800}
    assert loaded.config == {"steps": 500}
    assert weight(loaded) == 200
    assert names(folder) == ["latest", "step_00000100", "step_00000200"]
    assert (folder / "latest").read_text() == "step_00000200\n"
    assert names(loaded.path) == ["config.json", "manifest.json", "model.safetensors", "state.json"]
    manifest = json.loads((loaded.path / "manifest.json").read_text())
    assert manifest["torch"] == torch.__version__
    assert manifest["step"] == 200


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    state=st.dictionaries(st.text(), json_values, max_size=3),
    kinds=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=5
    ),
    step=st.integers(0, 10**12),
)
def test_round_trip_of_anything(
    tmp_path_factory: pytest.TempPathFactory,
    state: dict[str, Any],
    kinds: list[tuple[torch.dtype, list[int]]],
    step: int,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    tensors = {
        f"layer.{i}/ü {dtype}": (torch.randn(shape) * 3).to(dtype)
        for i, (dtype, shape) in enumerate(kinds)
    }
    checkpoint.save(folder, step, tensors={"a-1": tensors, "b": {}}, state=state, config=state)
    loaded = load(folder)
    assert (loaded.step, loaded.state, loaded.config) == (step, state, state)
    assert loaded.tensors["b"] == {}
    assert set(loaded.tensors["a-1"]) == set(tensors)
    for key, tensor in tensors.items():
        assert_same_bits(loaded.tensors["a-1"][key], tensor, key)


def test_only_the_named_groups_are_read(tmp_path: Path) -> None:
    model, moments = {"w": torch.ones(3)}, {"w/exp_avg": torch.zeros(3)}
    tensors = {"model": model, "optimizer": moments}
    path = checkpoint.save(tmp_path, 1, tensors=tensors, state={"a": 1}, config={"b": 2})
    for groups in (("model",), ("model", "heads"), ()):
        loaded = load(tmp_path, groups=groups)
        assert set(loaded.tensors) == {"model"} & set(groups)
        assert loaded.names == ("model", "optimizer")
        assert (loaded.state, loaded.config) == ({"a": 1}, {"b": 2})
        with pytest.raises(
            CheckpointError, match="read no tensors called 'optimizer'; there are: mod"
        ):
            loaded.group("optimizer")
        with pytest.raises(
            CheckpointError, match=": no tensors called 'heads'; there are: model, opt"
        ):
            loaded.group("heads")
    # Of what is not read, the size counts; of what is, every bit.
    file = path / "optimizer.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"\1")
    assert set(load(tmp_path, groups=("model",)).tensors) == {"model"}
    for wanted in (None, ("optimizer",)):
        with pytest.raises(
            CheckpointError, match=r"optimizer\.safetensors is not what was written"
        ):
            load(tmp_path, groups=wanted)
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors has \d+ bytes"):
        load(tmp_path, groups=())


def test_tied_and_strided_tensors(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    z = torch.randn(3, dtype=torch.complex64)
    tensors = {
        "base": base,
        "tied": base,
        "transposed": base.T,
        "slice": base[1:3],
        "column": base[:, 2],
        "expanded": base[:1].expand(5, 6),
        "conjugate": z.conj(),
        "negated": z.conj().imag,
        "parameter": nn.Parameter(base[0]),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    checkpoint.save(tmp_path, 1, tensors={"t": tensors}, state={}, config={})
    for key, tensor in load(tmp_path).group("t").items():
        assert_same_bits(tensor, tensors[key].detach().resolve_conj().resolve_neg(), key)
    assert torch.signbit(load(tmp_path).group("t")["nan"][2])


def test_a_tied_module_restores(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        model[2].weight = model[0].weight
        return model

    one, two = tied(), tied()
    checkpoint.save(tmp_path, 1, tensors={"m": one.state_dict()}, state={}, config={})
    checkpoint.restore("m", two.state_dict(), load(tmp_path).group("m"))
    assert two[2].weight is two[0].weight
    for key, value in one.state_dict().items():
        assert_same_bits(two.state_dict()[key], value, key)


def test_loaded_tensors_outlive_their_file(folder: Path) -> None:
    loaded = load(folder)
    shutil.rmtree(folder)
    loaded.group("model")["weight"].add_(1)
    assert weight(loaded) == 201


def test_given_step_and_device(folder: Path) -> None:
    assert weight(load(folder, step=100)) == 100
    assert load(folder, device=torch.device("meta")).group("model")["weight"].is_meta
    with pytest.raises(
        CheckpointError, match=r"no checkpoint of step 150 in .*there are: step_00000200, "
    ):
        load(folder, step=150)


def test_an_unknown_group_is_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensors called 'teacher'; there are: model"):
        load(folder).group("teacher")


# ---- keeping, replacing, going back ------------------------------------------------------------------------


def test_prunes_all_but_the_newest(tmp_path: Path) -> None:
    for step in range(0, 600, 100):
        save(tmp_path, step, keep=3)
    assert [path.name for path in find(tmp_path)] == [
        "step_00000500",
        "step_00000400",
        "step_00000300",
    ]
    save(tmp_path, 600, keep=1)
    assert names(tmp_path) == ["latest", "step_00000600"]


def test_what_is_not_a_checkpoint_is_left_alone(folder: Path) -> None:
    for name in ("step_5", "best", "step_00000100.bak", "notes.txt", "step_x.tmp"):
        (folder / name).mkdir()
    (folder / "step_00000150.tmp").mkdir()
    (folder / "step_00000150.tmp" / "model.safetensors").write_text("half")
    assert load(folder).step == 200
    save(folder, 300, keep=1)
    assert names(folder) == [
        *("best", "latest", "notes.txt", "step_00000100.bak", "step_00000300"),
        *("step_5", "step_x.tmp"),
    ]


def test_the_same_step_is_replaced(folder: Path) -> None:
    save(folder, 200, value=7)
    assert weight(load(folder)) == 7
    assert names(folder) == ["latest", "step_00000100", "step_00000200"]


def test_going_back_must_be_said(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step_00000200 are later.*discard_after.*untouched"):
        save(folder, 150)
    assert len(find(folder)) == 2
    checkpoint.discard_after(folder, 100)
    save(folder, 150)
    assert [path.name for path in find(folder)] == ["step_00000150", "step_00000100"]
    checkpoint.discard_after(folder, 150)
    checkpoint.discard_after(folder / "missing", 0)
    assert len(find(folder)) == 2
    assert (folder / "latest").read_text() == "step_00000150\n"
    checkpoint.discard_after(folder, 0)
    assert names(folder) == []


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got step -1 and keep 2"):
        save(tmp_path, -1)
    with pytest.raises(ValueError, match=r"got step 1 and keep 0"):
        save(tmp_path, 1, keep=0)


@pytest.mark.parametrize(
    ("tensors", "state", "message"),
    [
        ({"../x": {}}, {}, r"tensors cannot be called '../x'"),
        ({"": {}}, {}, r"tensors cannot be called ''"),
        ({"a": {"k": torch.eye(2).to_sparse()}}, {}, r"a: 'k' must be a dense tensor"),
        ({"a": {"k": torch.empty(2, device="meta")}}, {}, r"a: 'k' must be .* on meta"),
        ({"a": {"k": torch.zeros(2, dtype=torch.complex128)}}, {}, r"a: .*complex128"),
        ({}, {"loss": float("nan")}, r"state\.loss: must be a value that JSON has, got nan"),
        ({}, {"a": [1, {"b": {1}}]}, r"state\.a\[1\]\.b: must be a value that JSON has"),
        ({}, {"a": {3: 1}}, r"state\.a: keys must be text, got 3"),
    ],
)
def test_what_cannot_be_saved_leaves_nothing(
    folder: Path, tensors: Any, state: Any, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.save(folder, 300, tensors=tensors, state=state, config={})
    assert "step_00000200 is untouched" in str(caught.value)
    assert names(folder) == ["latest", "step_00000100", "step_00000200"]
