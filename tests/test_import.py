"""``import softdimo_fast`` costs torch and nothing else, and says what to do where it cannot work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.process import run_python, unbuilt_package

from softdimo_fast.ops import _library

ONE_CALL = (
    "import softdimo_fast, torch; "
    "value = softdimo_fast.soft_embedding(torch.zeros(2, 3), torch.ones(3, 1))"
)
NEW_MODULES = """
import json, sys
import torch
before = set(sys.modules)
import softdimo_fast
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps(sorted(new - sys.stdlib_module_names)))
"""


def test_import_pulls_nothing_beyond_torch() -> None:
    result = run_python("-c", NEW_MODULES)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == ["softdimo_fast"]


def test_import_needs_no_compiler_and_no_device(tmp_path: Path) -> None:
    code = f"{ONE_CALL}; print(value)"
    bare = {"PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "HOME": str(tmp_path)}
    result = run_python("-c", code, environment=bare)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["tensor([[1.],", "[1.]])"]
    assert list(tmp_path.iterdir()) == []


def test_missing_library_says_how_to_build_it(tmp_path: Path) -> None:
    folder = unbuilt_package(tmp_path)
    result = run_python("-c", "import softdimo_fast", folder=folder)
    assert result.returncode == 1
    expected = (
        f"ImportError: softdimo_fast is not built: {folder}/softdimo_fast/_cpu.so is missing. From a "
        "checkout run 'make install', or 'pip install -e .' with torch >= 2.11 and a C++ compiler present."
    )
    assert result.stderr.strip().splitlines()[-1] == expected


def test_unloadable_library_names_itself_and_torch(tmp_path: Path) -> None:
    folder = unbuilt_package(tmp_path)
    (folder / "softdimo_fast" / "_cpu.so").write_text("not a library")
    result = run_python("-c", "import softdimo_fast", folder=folder)
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert f"{folder}/softdimo_fast/_cpu.so does not load with torch {torch.__version__}" in message
    assert "rebuild it" in message


def test_library_dir_names_another_build(tmp_path: Path) -> None:
    folder = unbuilt_package(tmp_path)
    code = "from softdimo_fast.ops import _library; print(_library.FOLDER, _library.cpu_isa())"
    built = str(_library.FOLDER)
    result = run_python(
        "-c",
        code,
        folder=folder,
        environment={"SOFTDIMO_LIBRARY_DIR": built, "SOFTDIMO_CPU_ISA": "baseline"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [built, "baseline"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "SOFTDIMO_BACKEND",
            "gpu",
            "SOFTDIMO_BACKEND='gpu' is none of cuda, cpp, triton, reference",
        ),
        ("SOFTDIMO_CPU_ISA", "avx", "SOFTDIMO_CPU_ISA=avx is none of: "),
    ],
)
def test_wrong_variable_is_refused(name: str, value: str, message: str) -> None:
    result = run_python("-c", ONE_CALL, environment={name: value})
    assert result.returncode == 1
    assert message in result.stderr
