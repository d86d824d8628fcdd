"""``softdimo doctor``: the report, and that it also runs where the package cannot be imported."""

from __future__ import annotations

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from support.process import ROOT, run_python, unbuilt_package

import softdimo_fast
from softdimo_fast import cli
from softdimo_fast.cli import doctor
from softdimo_fast.ops import _explain, _library

COMMAND = ("softdimo_command.py", "doctor")


@pytest.fixture
def report() -> doctor.Report:
    return doctor.examine()


def _doctor_json(**options: Any) -> tuple[int, dict[str, Any]]:
    result = run_python(*COMMAND, "--json", **options)
    return result.returncode, json.loads(result.stdout)


def test_report_states_what_runs(report: doctor.Report) -> None:
    assert report.usable
    assert report.version == softdimo_fast.__version__
    assert report.torch == torch.__version__
    assert report.cpu_isa == _library.cpu_isa()
    assert report.cpu_isas == _library.compiled_cpu_isas()
    assert report.cpu_error is None


def test_every_public_operator_is_reported(report: doctor.Report) -> None:
    names = {operator.name for operator in report.operators}
    functions = {name for name in softdimo_fast.__all__ if callable(getattr(softdimo_fast, name))}
    assert names == functions - {"explain", "Explanation"}
    assert names == {fn.__name__ for fn in _explain.operators()}


def test_operators_match_what_calls_do(report: doctor.Report) -> None:
    for operator in report.operators:
        assert operator.obstacles["reference"] is None
        for backend, why in operator.obstacles.items():
            assert why is None or (why and "backend=" not in why), backend
    entry = next(operator for operator in report.operators if operator.name == "soft_embedding")
    assert (entry.device, entry.dtype, entry.chosen) == ("cpu", "float32", "cpp")
    assert entry.obstacles["cpp"] is None
    entry = next(operator for operator in report.operators if operator.name == "sample_tokens")
    assert entry.obstacles["triton"] == "this operator has no Triton kernel"


def test_text_has_every_section_and_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [line for line in lines if line and not line.startswith(" ")]
    assert titles[0] == f"softdimo_fast {softdimo_fast.__version__}"
    assert titles[1:3] == ["Compiled libraries", "Environment"]
    assert titles[3] == "Operators on the CPU, float32"
    assert titles[-2:] == ["Packages", "What to do"]
    assert all(line == line.rstrip() for line in lines)
    assert all(len(line) <= 100 for line in lines if "/" not in line)


def test_json_holds_the_same_facts(
    capsys: pytest.CaptureFixture[str], report: doctor.Report
) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["usable"] is True
    assert printed["cpu_isa"] == report.cpu_isa
    assert [entry["name"] for entry in printed["operators"]] == [
        entry.name for entry in report.operators
    ]
    assert printed["advice"] == report.advice


def test_unbuilt_package_says_what_to_do(tmp_path: Path) -> None:
    folder = unbuilt_package(tmp_path)
    code, printed = _doctor_json(folder=folder)
    assert code == 1
    assert not printed["usable"]
    assert printed["torch"] == torch.__version__
    assert printed["operators"] == []
    assert len(printed["advice"]) == 1
    assert f"{folder}/softdimo_fast/_cpu.so is missing" in printed["advice"][0]
    assert "make install" in printed["advice"][0]
    text = run_python(*COMMAND, folder=folder)
    assert text.returncode == 1
    assert "CPU  not usable: softdimo_fast is not built" in text.stdout


def test_other_commands_of_an_unbuilt_package_fail_in_one_sentence(tmp_path: Path) -> None:
    result = run_python("softdimo_command.py", "--help", folder=unbuilt_package(tmp_path))
    assert result.returncode == 1
    assert result.stderr.startswith("softdimo: softdimo_fast is not built")
    assert "softdimo doctor" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("module", "advice"),
    [
        (
            "torch",
            "torch cannot be imported (ModuleNotFoundError: No module named 'torch'). Install it",
        ),
        ("tyro", "tyro is required and missing: pip install 'tyro>=0.9'"),
    ],
)
def test_missing_requirement_is_named(tmp_path: Path, module: str, advice: str) -> None:
    folder = unbuilt_package(tmp_path)
    # Found by nobody, as if it were not installed.
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Hiding(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        f"        return None if name == {module!r} else super().find_spec(name, path, target)\n"
        "sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding\n"
    )
    libraries = {"SOFTDIMO_LIBRARY_DIR": str(_library.FOLDER)}
    code, printed = _doctor_json(folder=folder, environment=libraries)
    assert any(text.startswith(advice) for text in printed["advice"])
    assert printed["usable"] is (module != "torch")
    assert code == (1 if module == "torch" else 0)


def test_wrong_instruction_set_is_not_usable() -> None:
    code, printed = _doctor_json(environment={"SOFTDIMO_CPU_ISA": "avx"})
    assert code == 1
    assert printed["advice"][0].startswith("SOFTDIMO_CPU_ISA=avx is none of: ")


def test_mistyped_variable_is_advised_about() -> None:
    code, printed = _doctor_json(environment={"SOFTDIMO_BACKENDS": "cpp"})
    assert code == 0
    assert printed["environment"]["SOFTDIMO_BACKENDS"] == "cpp"
    assert any(
        text.startswith("SOFTDIMO_BACKENDS is set, but nothing reads it")
        for text in printed["advice"]
    )


def test_foreign_apex_is_not_taken_for_nvidias(tmp_path: Path) -> None:
    folder = unbuilt_package(tmp_path)
    (folder / "apex").mkdir()
    (folder / "apex" / "__init__.py").write_text("")
    libraries = {"SOFTDIMO_LIBRARY_DIR": str(_library.FOLDER)}
    _, printed = _doctor_json(folder=folder, environment=libraries)
    entry = next(package for package in printed["packages"] if package["name"] == "apex (NVIDIA)")
    assert entry["version"] is None
    assert "another project" in entry["command"]


def test_advice_for_a_driver_that_torch_does_not_use(report: doctor.Report) -> None:
    report.driver, report.torch_cuda, report.devices = "580.1", None, []
    assert "is a CPU build" in doctor._advice(report)[0]
    report.torch_cuda = "13.0"
    assert "sees no device" in doctor._advice(report)[0]
    report.devices, report.cuda_obstacle = ["a device"], "this build has no CUDA library"
    assert "Install a CUDA toolkit" in doctor._advice(report)[0]
    report.cuda_obstacle = None
    assert doctor._advice(report) == []


def test_device_has_a_section_of_its_own(report: doctor.Report) -> None:
    report.devices = ["NVIDIA H200, capability 9.0, 140 GiB"]
    obstacles = {
        "cuda": None,
        "cpp": "the C++ kernels need CPU tensors, these are on cuda:0",
        "triton": "this operator has no Triton kernel",
        "reference": None,
    }
    report.operators.append(
        doctor.Operator("an_operator", "cuda", "bfloat16", "cuda", "a kernel, sm_90a", obstacles)
    )
    lines = doctor.render(report).splitlines()
    assert any(line.endswith("NVIDIA H200, capability 9.0, 140 GiB") for line in lines)
    start = lines.index("Operators on CUDA, bfloat16")
    assert [line.strip() for line in lines[start + 1 : start + 5]] == [
        "an_operator  runs cuda: a kernel, sm_90a",
        "also reference",
        "no kernel: triton",
        "",
    ]


def test_variables_are_those_the_sources_read() -> None:
    sources = [ROOT / "setup.py", ROOT / "tests" / "conftest.py"]
    sources += [*ROOT.glob("softdimo_fast/ops/**/*.py"), *ROOT.glob("csrc/**/*.cpp")]
    sources += ROOT.glob("tests/support/*.py")
    pattern = re.compile(r"""(?:getenv\(|environ(?:\.get\(|\[))\s*"(SOFTDIMO_\w+)""")
    read = {name for path in sources for name in pattern.findall(path.read_text(encoding="utf-8"))}
    assert read == set(doctor.VARIABLES)


def test_packages_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [package.requirement for package in doctor.REQUIRED] == project["dependencies"]
    extras = project["optional-dependencies"]
    optional = {text for name, texts in extras.items() if name != "dev" for text in texts}
    assert {package.requirement for package in doctor.OPTIONAL} == optional


def test_installed_versions_are_reported(report: doctor.Report) -> None:
    versions = {package["name"]: package["version"] for package in report.packages}
    assert versions["torch"] == importlib.metadata.version("torch")
    assert versions["numpy"] == importlib.metadata.version("numpy")
