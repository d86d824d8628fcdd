"""k steps, a save, new objects and a resume give bit for bit what N steps in one go give."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from support.checks import assert_same_bits
from support.training import METHODS, snapshot, trainer

from softdimo_fast.trainers import CheckpointError, CheckpointWarning, NonFiniteError, Stopped
from softdimo_fast.trainers.progress import NoProgress
from softdimo_fast.trainers.run_log import RunLog
from softdimo_fast.trainers.trainer import Trainer


def logged(folder: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    return [
        {name: value for name, value in line.items() if name != "samples_per_second"}
        for line in RunLog.read(folder)
    ]


def assert_same_state(first: Trainer, second: Trainer) -> None:
    states = snapshot(first), snapshot(second)
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert_same_bits(value, states[1][name], name)


def stop_after(run: Trainer, step: int, *, resume: bool = False) -> None:
    with pytest.raises(Stopped, match=f"stopped at step {step} of"):
        run.run(resume=resume, stop=lambda: run.step >= step)


# Step 3 lies within a log interval, at the codebook's start and at the end of the warm-up.
CUTS = [(name, 3) for name in METHODS] + [("tokenizer", 2), ("tokenizer", 5), ("all, warm-up", 2)]


@pytest.mark.parametrize(("name", "cut"), CUTS)
def test_resume_is_bitwise(name: str, cut: int, tmp_path: Path) -> None:
    whole = trainer(name, tmp_path / "whole")
    whole.run()
    stop_after(trainer(name, tmp_path / "cut"), cut)
    resumed = trainer(name, tmp_path / "cut")
    resumed.run(resume=True)
    assert resumed.step == 6
    assert_same_state(whole, resumed)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    assert [line["step"] for line in logged(tmp_path / "whole")] == [2, 4, 6]


class SignalProgress(NoProgress):
    """A terminal at which somebody asks to stop after the second step."""

    def __init__(self) -> None:
        self.closed = False

    def update(self, step: int, **text: object) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    def close(self) -> None:
        self.closed = True


def test_a_signal_saves_and_stops(tmp_path: Path) -> None:
    progress = SignalProgress()
    run = trainer("teacher", tmp_path / "cut", progress=progress)
    with pytest.raises(Stopped, match="stopped at step 2 of 6"):
        run.run()
    assert progress.closed
    whole, resumed = trainer("teacher"), trainer("teacher", tmp_path / "cut")
    whole.run()
    resumed.run(resume=True)
    assert_same_state(whole, resumed)


def test_a_run_without_a_folder_is_the_same(tmp_path: Path) -> None:
    kept, free = trainer("teacher", tmp_path), trainer("teacher")
    kept.run()
    free.run()
    assert_same_state(kept, free)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    trainer("teacher", tmp_path).run()
    again = trainer("teacher", tmp_path)
    again.run(resume=True)
    assert again.step == 6
    assert [line["step"] for line in logged(tmp_path)] == [2, 4, 6]


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path) -> None:
    whole, first = trainer("all", tmp_path / "whole"), trainer("all", tmp_path / "cut")
    whole.run()
    stop_after(first, 5)
    folder = tmp_path / "cut" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_00000003", "step_00000005"]
    weights = folder / "step_00000005" / "student.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 16
    weights.write_bytes(content)
    again = trainer("all", tmp_path / "cut")
    with pytest.warns(CheckpointWarning, match=r"step_00000005.*student\.safetensors"):
        stop_after(again, 4, resume=True)  # the damaged one, of a later step, is not in the way
    resumed = trainer("all", tmp_path / "cut")
    resumed.run(resume=True)
    assert_same_state(whole, resumed)
    # The lines of the steps that were done again stand in the log once.
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")


def test_no_usable_checkpoint(tmp_path: Path) -> None:
    run = trainer("teacher", tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*empty"):
        run.run(resume=True)
    assert run.step == 0
    with pytest.raises(CheckpointError, match="without a folder"):
        trainer("teacher").run(resume=True)


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    stop_after(trainer("teacher", tmp_path), 2)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match="holds a run already: resume it"):
        trainer("teacher", tmp_path).run()
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_what_a_run_left_before_its_first_checkpoint_is_overwritten(tmp_path: Path) -> None:
    class Killed(NoProgress):
        def update(self, step: int, **text: object) -> None:
            if step == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer("teacher", tmp_path, progress=Killed()).run()
    assert [line["step"] for line in logged(tmp_path)] == [2]
    trainer("teacher", tmp_path).run()
    assert [line["step"] for line in logged(tmp_path)] == [2, 4, 6]


def test_another_config_is_refused(tmp_path: Path) -> None:
    config = {"method": "teacher", "optimizer": {"learning_rate": 0.01, "clip_norm": None}}
    stop_after(trainer("teacher", tmp_path, run_config=config), 2)
    changed = {"method": "teacher", "optimizer": {"learning_rate": 0.02, "clip_norm": None}}
    run = trainer("teacher", tmp_path, run_config=changed)
    before = snapshot(run)
    with pytest.raises(CheckpointError, match=r"optimizer\.learning_rate: 0\.01 -> 0\.02"):
        run.run(resume=True)
    for name, value in snapshot(run).items():
        assert_same_bits(value, before[name], name)
    trainer("teacher", tmp_path, run_config=config).run(resume=True)


def test_another_seed_is_refused(tmp_path: Path) -> None:
    stop_after(trainer("teacher", tmp_path), 2)
    with pytest.raises(CheckpointError, match="seed: 0 -> 1"):
        trainer("teacher", tmp_path, seed=1).run(resume=True)


def test_another_model_or_method_is_refused(tmp_path: Path) -> None:
    stop_after(trainer("teacher", tmp_path), 2)
    with pytest.raises(CheckpointError, match="teacher: the saved tensors do not fit"):
        trainer("grouped teacher", tmp_path).run(resume=True)
    with pytest.raises(CheckpointError, match="no tensors called 'classifier'; there are: teacher"):
        trainer("classifier", tmp_path).run(resume=True)


def test_a_failed_run_can_be_resumed_to_the_same_failure(tmp_path: Path) -> None:
    """A step that is not finite is a function of its number: the resume meets it again."""
    for resume in (False, True):
        run = trainer("teacher", tmp_path, checkpoint_every=1)
        run.method.teacher.output.bias.register_hook(  # type: ignore[attr-defined]
            lambda g, run=run: g * float("nan") if run.step == 3 else g
        )
        with pytest.raises(NonFiniteError, match="the first at step 3"):
            run.run(resume=resume)
