"""``softdimo config``, ``train``, ``sample`` and ``tteo``: what they do, and what they say to wrong input."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command import Command
from support.process import ROOT
from support.runs import OVERRIDES, tiny, train

from softdimo_fast import _config, cli
from softdimo_fast.recipes import RECIPES, recipe
from softdimo_fast.recipes.build import finished_run, is_finished
from softdimo_fast.trainers import checkpoint

safetensors = pytest.importorskip("safetensors.torch")
for package in ("sklearn", "PIL"):
    pytest.importorskip(package)

METHODS = tuple(RECIPES["digits"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for method in ("reward_classifier", "tokenizer", "teacher", "distillation"):
        train(root, method)
    return root


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """Tiny finished runs, to be used or spoilt."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def softdimo(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a refused command says."""
    capsys.readouterr()
    assert softdimo(*arguments) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert "Traceback" not in written.err
    return written.err.removeprefix("softdimo: ")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- config ------------------------------------------------------------------------------------------------


def test_config_prints_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert softdimo("config", "digits") == 0
    text = capsys.readouterr().out
    for method in METHODS:
        command = "tteo digits" if method == "tteo" else f"train {method} digits"
        assert f"# softdimo {command}\n" in text
        assert _config.render(recipe("digits", method)) in text
    assert not re.search(r":\w+:`|``", text)
    assert max(map(len, text.splitlines())) <= 120


def test_config_of_one_method_as_json_is_its_config(capsys: pytest.CaptureFixture[str]) -> None:
    for method in METHODS:
        assert softdimo("config", "digits", "--method", method, "--seed", 3, "--json") == 0
        document = json.loads(capsys.readouterr().out)
        config = recipe("digits", method, seed=3)
        assert _config.from_dict(type(config), document) == config
    assert softdimo("config", "digits", "--json") == 0
    assert tuple(json.loads(capsys.readouterr().out)) == METHODS


def test_a_printed_line_is_an_override(capsys: pytest.CaptureFixture[str]) -> None:
    assert softdimo("config", "digits", "--method", "adversarial") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " = " in line]
    assert len(lines) > 50
    assignments = []
    for line in lines:
        name, value = line.split("#")[0].split(" = ")
        assignments.append(f"{name.strip()}={value.strip()}")
    config = recipe("digits", "adversarial")
    assert _config.override(config, assignments) == config


# ---- train -------------------------------------------------------------------------------------------------


def test_train_with_settings_then_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "judge"
    arguments = ["train", "judge", "digits", "--out", out, "--seed", 5]
    settings = [*OVERRIDES["judge"], "trainer.steps=6"]
    assert softdimo(*arguments, "--set", *settings) == 0
    written = capsys.readouterr()
    assert written.out == f"judge: 6 steps, in {out}\n"
    assert "judge: 1/6 steps (16 %)" in written.err
    assert written.err.splitlines()[-1].startswith("judge: done after")
    assert finished_run(out) == tiny("judge", "trainer.steps=6", seed=5)
    whole = contents(out / "checkpoints" / "step_00000006")
    checkpoint.discard_after(out / "checkpoints", 4)
    assert not is_finished(out)
    assert softdimo(*arguments, "--resume", "--set", *settings) == 0
    assert contents(out / "checkpoints" / "step_00000006") == whole


def test_train_from_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "judge.json"
    assert softdimo("config", "digits", "--method", "judge", "--seed", 2, "--json") == 0
    file.write_text(capsys.readouterr().out)
    out = tmp_path / "run"
    assert (
        softdimo("train", "judge", "digits", "--out", out, "--config", file, "--set", *OVERRIDES["judge"])
        == 0
    )  # fmt: skip
    assert finished_run(out) == tiny("judge", seed=2)


@pytest.mark.parametrize("method", ["reward_classifier", "tokenizer", "teacher", "control"])
def test_every_kind_of_run_trains_where_its_inputs_are(runs: Path, method: str) -> None:
    out = runs / "new"
    assert softdimo("train", method, "digits", "--out", out, "--set", *OVERRIDES[method]) == 0
    assert finished_run(out) == tiny(method)


def test_train_in_the_folder_itself(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (runs / "here").mkdir()
    monkeypatch.chdir(runs / "here")
    assert softdimo("train", "teacher", "digits", "--out", ".", "--set", *OVERRIDES["teacher"]) == 0
    assert is_finished(runs / "here")
    assert softdimo("sample", ".", "--count", 3, "--out", "x.png") == 0


def test_train_stops_at_ctrl_c_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "judge"
    arguments = ["train", "judge", "digits", "--out", str(out)]
    command = Command(*arguments)
    command.wait_until((out / "log.jsonl").exists)
    command.interrupt()
    assert command.end() == 75
    assert re.search(
        r"softdimo: stopped at step \d+ of \d+; saved, resume to go on\n$", command.err
    )
    step = checkpoint.load(out / "checkpoints").step
    assert 0 < step < recipe("digits", "judge").trainer.steps
    assert not is_finished(out)


# ---- sample ------------------------------------------------------------------------------------------------


def sampled(path: Path) -> Any:
    return safetensors.load_file(path)["images"]


def test_sample_writes_pictures_and_tensors(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    for run in ("distillation", "teacher"):
        png, tensors = tmp_path / f"{run}.png", tmp_path / "deep" / f"{run}.safetensors"
        assert softdimo("sample", runs / run, "--count", 20, "--out", png) == 0
        assert capsys.readouterr().out == f"20 images in {png}\n"
        assert Image.open(png).size[0] > 16 * 8
        assert softdimo("sample", runs / run, "--count", 20, "--out", tensors) == 0
        assert capsys.readouterr().out == f"20 images in {tensors}\n"
        images = sampled(tensors)
        assert images.shape == (20, 1, 8, 8)
        assert images.dtype == torch.float32
        assert images.abs().max() <= 1


def test_sample_options_change_the_images(runs: Path, tmp_path: Path) -> None:
    def images(run: str, *options: object) -> Any:
        path = tmp_path / "images.safetensors"
        assert softdimo("sample", runs / run, "--out", path, "--count", 16, *options) == 0
        return sampled(path)

    one_step, steps = images("distillation"), images("teacher")
    assert torch.equal(images("distillation", "--seed", 0), one_step)
    assert torch.equal(images("distillation", "--steps", 1, "--decode", "sample"), one_step)
    for options in (
        ["--seed", 1], ["--decode", "argmax"], ["--decode", "soft"], ["--temperature", 0.1],
        ["--set", "initial_ratio=0.1"],
    ):  # fmt: skip
        assert not torch.equal(images("distillation", *options), one_step), options
    for options in (
        ["--seed", 1], ["--steps", 2], ["--temperature", 0.1],
        ["--set", "confidence_temperature=0"],
    ):  # fmt: skip
        assert not torch.equal(images("teacher", *options), steps), options
    # These few steps taught little: the classes differ by less than what changes a token.
    first, second = (images("distillation", "--decode", "soft", "--condition", c) for c in (0, 1))
    assert not torch.equal(first, second)
    # All classes in turn, unless one is asked for; each image is its own seed's and number's.
    assert torch.equal(images("distillation", "--condition", 1)[1::2], one_step[1::2])
    assert torch.equal(images("distillation", "--count", 4), one_step[:4])


# ---- tteo --------------------------------------------------------------------------------------------------


def test_tteo_writes_a_picture_and_the_rewards(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found"
    arguments = ["tteo", "digits", "--runs", runs, "--out", out]
    settings = ["samples=20", "search.iterations=2", "search.optimizer=adam"]
    assert softdimo(*arguments, "--set", *settings) == 0
    said = capsys.readouterr().out
    found = json.loads((out / "tteo.json").read_text())
    assert found["wanted"] == [*range(10), *range(10)]
    pairs = list(zip(found["reward_before"], found["reward_after"], strict=True))
    assert len(pairs) == 20
    assert all(after >= before for before, after in pairs)
    assert any(after > before for before, after in pairs)
    assert re.fullmatch(
        rf"mean reward -?\d\.\d+ -> -?\d\.\d+ over 20 samples, in {re.escape(str(out))}\n", said
    )
    assert (out / "tteo.png").read_bytes()[:4] == b"\x89PNG"
    first = (out / "tteo.json").read_bytes()
    assert softdimo(*arguments, "--set", *settings, "--seed", 9) == 0
    assert (out / "tteo.json").read_bytes() != first


# ---- wrong names and values --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("config digit", r"recipe: must be .*'digits'.* got 'digit'; did you mean 'digits'\?"),
        ("config digits --method techer", r"method: .* got 'techer'; did you mean 'teacher'\?"),
        ("train teacher digts", r"recipe: must be .*'digits'.* got 'digts'; did you mean 'digits'\?"),
        ("train techer digits", r"method: .* got 'techer'; did you mean 'teacher'\?"),
        ("train tteo digits", r"tteo trains nothing: it is `softdimo tteo digits`"),
        ("train judge digits --set trainer.stepz=3", r"trainer\.stepz: .*mean 'trainer\.steps'\?"),
        ("train judge digits --set trainer.steps", r"must be name=value, .* got 'trainer\.steps'"),
        ("train judge digits --set trainer.steps=0", r"trainer\.steps: .* >= 1, got 0"),
        ("train judge digits --set trainer.steps=ten", r"trainer\.steps: .* integer, got 'ten'"),
        ("train judge digits --set trainer.device=gpu", r"trainer\.device: must be a device .*'gpu'"),
        ("train judge digits --set trainer.nan_policy=skp", r"nan_policy: .* did you mean 'skip'\?"),
        ("train judge digits --set model.num_classes=2", r"model\.num_classes: must be 10, .* got 2"),
        ("train adversarial digits --set adversarial.weight=-1", r"adversarial\.weight: .* got -1"),
        ("train judge digits --config missing.json", r"No such file or directory: 'missing\.json'"),
        ("train judge digits --resume", r"--resume: .*judge holds no run \(no checkpoint was found\)"),
        ("train teacher digits", r"tokenizer holds no trained run \(no checkpoint was found\)"),
        ("tteo digits --runs missing", r"missing/distillation holds no trained run"),
        ("tteo digits --set search.iterations=-1", r"search\.iterations: .* >= 0, got -1"),
        ("sample missing", r"missing holds no trained run \(no checkpoint was found\)"),
        ("sample missing --count 0", r"--count: must be a number >= 1, got 0"),
        ("sample missing --out x.jpg", r"--out must end in \.png or \.safetensors, got x\.jpg"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert re.search(message, refused(capsys, *arguments.split()))
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "arguments",
    ["", "trian judge digits", "train judge", "train judge digits --steps 3", "demo --seed x"],
)
def test_what_the_parser_refuses_ends_the_same_way(
    capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        softdimo(*arguments.split())
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ("distillation", ["--condition", 2], r"--condition: must be a number >= 0 and <= 1, got 2"),
        ("distillation", ["--condition", -1], r"--condition: .* got -1"),
        ("distillation", ["--steps", 4], r"--steps is a teacher's: the generator in .* got 4"),
        ("distillation", ["--temperature", 0], r"temperature: must be a number > 0, got 0"),
        ("distillation", ["--set", "initial_ratoi=1"], r"did you mean 'initial_ratio'\?"),
        ("teacher", ["--decode", "soft"], r"--decode is a generator's: the teacher in .* got soft"),
        ("teacher", ["--steps", 0], r"steps: must be a number >= 1, got 0"),
        ("tokenizer", [], r"tokenizer holds a TokenizerRun, which makes no images"),
        ("teacher", ["--one-step"], r"--one-step is for published models; .* a run of digits"),
        ("teacher", ["--device", "cpu"], r"--device is for published models; .* a run of digits"),
        ("teacher", ["--batch-size", 16], r"--batch-size is for published models; .* of digits"),
        ("teacher", ["--tokenizer", "x"], r"--tokenizer is for published models; .* of digits"),
    ],
)
def test_what_a_run_cannot_sample(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    run: str, options: list[object], message: str,
) -> None:  # fmt: skip
    out = tmp_path / "x.png"
    assert re.search(message, refused(capsys, "sample", runs / run, "--out", out, *options))
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"--config .*file\.json is no JSON: "),
        ("\x00\xff", r"--config .*file\.json is no JSON: "),
        ("[]", r"must be the fields of ClassifierRun, got \[\]"),
        ('{"trainer": {"stepz": 3}}', r"trainer\.stepz: no such field .*did you mean 'steps'\?"),
        ('{"trainer": {}, "method": {}}', r"model: is missing"),
        ('{"trainer": {"seed": "one"}}', r"trainer\.seed: must be an integer, got 'one'"),
        ('{"trainer": {"steps": NaN}}', r"trainer\.steps: must be an integer, got nan"),
    ],
)
def test_wrong_config_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    file, out = tmp_path / "file.json", tmp_path / "out"
    file.write_bytes(text.encode("latin-1"))
    said = refused(capsys, "train", "judge", "digits", "--config", file, "--out", out)
    assert re.search(message, said)
    assert not out.exists()


def test_two_sources_of_the_seed_are_one_too_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.json"
    file.write_text(json.dumps(_config.to_dict(tiny("judge"))))
    for command in (["train", "judge", "digits"], ["tteo", "digits"]):
        said = refused(capsys, *command, "--config", file, "--seed", 4)
        assert said.startswith("--seed 4: the seed is that in --config")


# ---- other runs that are missing, unfinished or damaged ----------------------------------------------------


def test_unfinished_inputs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.discard_after(runs / "teacher" / "checkpoints", 2)
    message = r"teacher stands at step 2 of 4: finish it first"
    out = runs / "new"
    assert re.search(message, refused(capsys, "train", "distillation", "digits", "--out", out))
    assert re.search(message, refused(capsys, "sample", runs / "teacher", "--out", out / "x.png"))
    assert not (out / "x.png").exists()


def test_a_role_that_the_run_has_not(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "tteo", "digits", "--runs", runs, "--set", "generator=teacher")
    assert re.search(r"teacher/.*: no model 'student'; there are: teacher", said)


def only_checkpoint(run: Path) -> Path:
    """Removes the earlier ones."""
    newest, *others = checkpoint.find(run / "checkpoints")
    for path in others:
        shutil.rmtree(path)
    return newest


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"student_average\.safetensors has \d+ bytes, \d+ were written"),
        (flip, r"student_average\.safetensors is not what was written: its sha256 differs"),
        (Path.unlink, r"student_average\.safetensors: No such file"),
    ],
)
def test_damaged_checkpoints_are_not_sampled(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None], message: str,
) -> None:  # fmt: skip
    damage(only_checkpoint(runs / "distillation") / "student_average.safetensors")
    out = tmp_path / "x.png"
    said = refused(capsys, "sample", runs / "distillation", "--out", out)
    assert re.search(r"no usable checkpoint:\n  .*step_00000004: " + message, said)
    assert not out.exists()


@pytest.mark.filterwarnings("always:not every checkpoint is intact")
def test_a_damaged_newest_checkpoint_is_warned_of(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(runs / "distillation" / "checkpoints" / "step_00000004" / "config.json")
    said = refused(capsys, "sample", runs / "distillation", "--out", tmp_path / "x.png")
    first, damage, last = said.splitlines()
    assert first.startswith("warning: not every checkpoint is intact; ")
    assert "config.json is not what was written" in damage
    assert last.endswith("stands at step 2 of 4: finish it first, by a resume")


def test_a_checkpoint_of_other_shapes(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Written by the package, valid in itself, with a tensor that the model has not."""
    loaded = checkpoint.load(runs / "distillation" / "checkpoints")
    tensors = {name: dict(group) for name, group in loaded.tensors.items()}
    name = next(iter(tensors["student_average"]))
    tensors["student_average"][name] = torch.zeros(3, 5)
    checkpoint.save(
        runs / "distillation" / "checkpoints", loaded.step,
        tensors=tensors, state=loaded.state, config=loaded.config,
    )  # fmt: skip
    said = refused(capsys, "sample", runs / "distillation", "--out", tmp_path / "x.png")
    assert "student_average: the saved tensors do not fit" in said
    assert re.search(rf"1 of another shape or dtype: {name}: float32 \[3, 5\], expected", said)


def test_a_resume_with_nothing_usable_does_not_begin_anew(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs / "tokenizer"
    for path in run.glob("checkpoints/step_*/tokenizer.safetensors"):
        truncate(path)
    before = contents(run)
    said = refused(
        capsys, "train", "tokenizer", "digits", "--out", run, "--resume", "--set", *OVERRIDES["tokenizer"]
    )  # fmt: skip
    assert said.startswith("no usable checkpoint:\n")
    assert said.count("were written") == 2
    assert contents(run) == before


def test_a_resume_with_another_config_and_a_start_in_a_used_folder(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs / "tokenizer"
    before = contents(run)
    command = ["train", "tokenizer", "digits", "--out", run]
    settings = ["--set", *OVERRIDES["tokenizer"]]
    said = refused(capsys, *command, "--resume", *settings, "method.commitment_weight=0.5")
    assert re.search(
        r"another configuration:\n  run\.method\.commitment_weight: [\d.]+ -> 0\.5", said
    )
    said = refused(capsys, *command, "--resume", *settings, "trainer.seed=8")
    assert "run.trainer.seed: 0 -> 8" in said
    said = refused(capsys, *command, *settings)
    assert f"{run} holds a run already: --resume goes on with it, --out names another" in said
    assert contents(run) == before


# ---- places that cannot be written -------------------------------------------------------------------------


def test_a_file_in_place_of_a_folder(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    settings = ["--set", *OVERRIDES["judge"]]
    for arguments in (
        ["train", "judge", "digits", "--out", file, *settings],
        ["train", "judge", "digits", "--out", file / "below", *settings],
        ["tteo", "digits", "--runs", runs, "--out", file, "--set", "samples=1"],
        ["sample", runs / "distillation", "--out", file / "x.png"],
    ):
        said = refused(capsys, *arguments)
        assert said.startswith("--out")
        assert str(file) in said
    (tmp_path / "x.png").mkdir()
    said = refused(capsys, "sample", runs / "distillation", "--out", tmp_path / "x.png")
    assert f"Is a directory: '{tmp_path / 'x.png'}'" in said
    assert file.read_text() == "mine"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A place for less than 64 KiB: a file system, or else a limit on the size of files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    if shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0:
        yield disk
        subprocess.run(["umount", str(disk)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    yield disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FULL = r"No space left on device|File too large|I/O error"


def test_a_full_disk_in_training(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = small_disk / "run"
    settings = [*OVERRIDES["judge"], "model.width=64"]
    said = refused(capsys, "train", "judge", "digits", "--out", out, "--set", *settings)
    assert "the checkpoint of step 2 could not be written in" in said
    assert re.search(FULL, said)
    assert "Nothing half written was left; there is no earlier one." in said
    assert list((out / "checkpoints").iterdir()) == []


def test_a_full_disk_for_images(
    runs: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = small_disk / "x.safetensors"
    assert softdimo("sample", runs / "distillation", "--count", 16, "--out", out) == 0
    before = out.read_bytes()
    said = refused(capsys, "sample", runs / "distillation", "--count", 1000, "--out", out)
    assert re.search(FULL, said)
    assert str(out) in said
    assert out.read_bytes() == before
    assert [path.name for path in small_disk.iterdir()] == ["x.safetensors"]


# ---- what is not installed ---------------------------------------------------------------------------------

# None in sys.modules is a package that cannot be imported.
WITHOUT = (
    "import sys; sys.modules[{!r}] = None; from softdimo_fast import cli; sys.exit(cli.main({}))"
)


@pytest.mark.parametrize(
    ("package", "arguments", "message"),
    [
        ("sklearn", ["demo"], "the demo needs scikit-learn: "),
        ("matplotlib", ["demo"], "the demo needs matplotlib: "),
        ("sklearn", ["train", "judge", "digits"], "the digits come with scikit-learn, which is missing: "),
        ("PIL", ["sample", "run"], "needs Pillow: "),
    ],
)  # fmt: skip
def test_a_missing_extra_is_named(
    runs: Path, package: str, arguments: list[str], message: str
) -> None:
    out = runs / "new" / "x.png"
    arguments = [
        str(runs / "distillation") if argument == "run" else argument for argument in arguments
    ]
    arguments += ["--out", str(out)]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(package, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 2
    assert message in result.stderr
    assert re.search(r'pip install "softdimo-fast\[\w+\]"', result.stderr)
    assert "Traceback" not in result.stderr
    assert not out.exists()
