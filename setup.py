"""Drives CMakeLists.txt from pip; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools

# pip checks this itself, except with --no-build-isolation, where the errors of older ones are obscure.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"softdimo_fast: setuptools {setuptools.__version__} is installed, but >= 77 is needed. Upgrade it: "
        "pip install -U setuptools"
    )

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 11)


def find_torch() -> Path:
    """The folder of the installed torch, seen also from inside pip's isolated build environment."""
    candidates = [Path(p) for p in sys.path if p]
    candidates += [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    # Build isolation hides site-packages from sys.path, but the interpreter still knows where it is.
    for prefix in {sys.prefix, sys.exec_prefix, os.environ.get("VIRTUAL_ENV", sys.prefix)}:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        candidates.append(Path(prefix) / "lib" / version / "site-packages")
    for folder in candidates:
        header = folder / "torch" / "version.py"
        if header.is_file():
            check_torch_version(header)
            return folder / "torch"
    raise SystemExit(
        "softdimo_fast: no torch was found. Install it first, so that no second one is downloaded:\n"
        "    pip install 'torch>=2.11'\n"
        "then run this command again (with --no-build-isolation if it still is not found)."
    )


def check_torch_version(version_file: Path) -> None:
    scope: dict[str, object] = {}
    exec(version_file.read_text(encoding="utf-8"), scope)
    version = str(scope["__version__"])
    found = tuple(int(part) for part in version.split(".")[:2])
    if found < MINIMUM_TORCH:
        raise SystemExit(
            f"softdimo_fast: torch {version} is installed in {version_file.parent}, but torch >= "
            f"{'.'.join(map(str, MINIMUM_TORCH))} is needed. Upgrade it: pip install -U torch"
        )


def check_compiler() -> None:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        raise SystemExit(
            f"softdimo_fast: no C++ compiler was found ('{compiler}' is not on PATH). Install one "
            "(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++), or set CXX."
        )


def find_tool(name: str) -> str:
    """cmake and ninja come from the build requirements, or from PATH with --no-build-isolation."""
    beside_python = Path(sys.executable).parent / name
    found = shutil.which(name) or (str(beside_python) if beside_python.exists() else None)
    if found is None:
        raise SystemExit(
            f"softdimo_fast: {name} was not found. Install it: pip install {name} (or from your "
            "system's packages)."
        )
    return found


def start_afresh_if_changed(build: Path, settings: list[str]) -> None:
    """CMake remembers what an earlier configuration set, also when it is no longer given."""
    record = build / "settings"
    text = "\n".join(settings)
    if not record.is_file() or record.read_text(encoding="utf-8") != text:
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        record.write_text(text, encoding="utf-8")


class CMakeBuild(build_ext):
    """Runs CMake once and puts _cpu.so (and _cuda.so where a CUDA toolkit was found) in the package."""

    def run(self) -> None:
        torch = find_torch()
        check_compiler()
        package = ROOT if self.inplace else Path(self.build_lib).resolve()
        # Editable installs get a new temporary folder each time; a fixed one makes them incremental.
        temporary = ROOT / "build" if self.inplace else Path(self.build_temp).resolve()
        build = temporary / "cmake"
        output = build / "lib"
        settings = [
            f"-DTORCH_ROOT={torch}",
            f"-DSOFTDIMO_OUTPUT={output}",
            *os.environ.get("SOFTDIMO_CMAKE_ARGS", "").split(),
        ]
        start_afresh_if_changed(build, settings)
        cmake = find_tool("cmake")
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}", *settings,
        ]  # fmt: skip
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        shutil.rmtree(output, ignore_errors=True)
        for command in (configure, [cmake, "--build", str(build), "--parallel", jobs]):
            if subprocess.run(command).returncode:
                raise SystemExit("softdimo_fast: the build failed; the lines above say why")
        target = package / "softdimo_fast"
        target.mkdir(parents=True, exist_ok=True)
        for old in target.glob("_c*.so"):
            old.unlink()
        for library in sorted(output.glob("*.so")):
            # Written beside, then renamed: a running process keeps its mapped library.
            part = target / f".{library.name}.part"
            shutil.copy2(library, part)
            part.rename(target / library.name)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "softdimo_fast"
        return [str(path) for path in sorted(package.glob("_c*.so"))]


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: the libraries hold no Python symbol, so one wheel serves every Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("softdimo_fast._cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
