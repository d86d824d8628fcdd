"""Compiles the CUDA kernels and their bindings for the CPU (tests/emulation) and loads them.

``torch.ops.softdimo_emulated.NAME`` is then the CUDA kernel of ``torch.ops.softdimo.NAME``, run on CPU
tensors. A source is compiled again when it or a header that it includes has changed.

With SOFTDIMO_EMULATION_SANITIZE=1 they are compiled with AddressSanitizer and UndefinedBehaviorSanitizer,
whose run-time libraries have to be in the process from its start:

    SOFTDIMO_EMULATION_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 \\
    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \\
    python -m pytest tests/emulation

(detect_leaks=0 because Python keeps memory to its end; libstdc++ so that exceptions are intercepted too.)
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
EMULATION = ROOT / "tests" / "emulation"
NAME = "softdimo_emulation"
TORCH = Path(torch.__file__).parent
# As in CMakeLists.txt: the oldest torch whose stable interface the bindings use.
TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# The schemas, of a library of another name.
OPS = ROOT / "csrc" / "ops.cpp"
RENAMED = "-Dsoftdimo=softdimo_emulated"
SANITIZE = os.environ.get("SOFTDIMO_EMULATION_SANITIZE", "0") not in ("", "0")


def _compiler() -> list[str]:
    optimisation = (
        ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        if SANITIZE
        else ["-O2"]
    )
    return [
        *os.environ.get("CXX", "g++").split(),
        "-std=c++17", *optimisation, "-fPIC", "-fvisibility=hidden",
        "-fno-strict-aliasing",  # kernels read memory as vectors
        "-ffp-contract=off",  # as nvcc is told: fused only where the source says fmaf
        "-U_FORTIFY_SOURCE",  # its longjmp refuses to change stacks
        "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
        f"-I{EMULATION}",  # before ours: launch.h, ptx.cuh, device.h and CUDA's own headers are found here
        f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc'}",
        "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include"),
        "-isystem", str(TORCH / "include"), TARGET_VERSION,
    ]  # fmt: skip


def _run(command: list[str]) -> bytes:
    """Runs the compiler; the sanitizers of a preloaded run are not for it."""
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE).stdout


def _common_fingerprint() -> bytes:
    """Of what every object depends on: the compiler, how it is called, the libraries' headers."""
    digest = hashlib.sha256(_run([_compiler()[0], "--version"]))
    versions = (_compiler(), sys.version, pybind11.__version__, torch.__version__)
    digest.update(repr(versions).encode())
    return digest.digest()


def _inputs(rule: Path) -> list[Path]:
    """What an object was made of, by the rule that the compiler wrote: "OBJECT: SOURCE HEADER ..."."""
    words = rule.read_text().replace("\\\n", " ").split() if rule.exists() else []
    return [Path(name) for name in words[1:]]


def _fingerprint(common: bytes, inputs: list[Path]) -> str:
    digest = hashlib.sha256(common)
    for path in inputs:
        digest.update(str(path).encode())
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()[:16]


def _object(source: Path, folder: Path, common: bytes) -> Path:
    """The object file of a source, named by all that it depends on."""
    name = f"{source.parent.name}-{source.stem}"
    rule = folder / f"{name}.d"
    inputs = _inputs(rule)
    target = folder / f"{name}-{_fingerprint(common, inputs)}.o"
    if not inputs or not target.exists():
        for old in folder.glob(f"{name}-*.o"):
            old.unlink()
        part = folder / f"{name}.part"
        options = [*([RENAMED] if source == OPS else []), "-MMD", "-MF", str(rule)]
        started = time.time()
        _run([*_compiler(), *options, "-c", "-x", "c++", str(source), "-o", str(part)])
        inputs = _inputs(rule)
        # What was edited meanwhile is compiled again next time.
        edited = any(path.stat().st_mtime >= started for path in inputs)
        target = folder / f"{name}-{'edited' if edited else _fingerprint(common, inputs)}.o"
        part.rename(target)
    return target


def build() -> Path:
    """The compiled module, fresh or from build/emulation."""
    folder = ROOT / "build" / "emulation" / ("sanitized" if SANITIZE else "plain")
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / (NAME + sysconfig.get_config_var("EXT_SUFFIX"))
    sources = [EMULATION / "module.cpp", *sorted(EMULATION.glob("planted*.cu")), OPS]
    for path in (EMULATION / "bind", ROOT / "csrc" / "cuda", ROOT / "csrc" / "bind_cuda"):
        sources += [source for source in sorted(path.glob("*.c*")) if source.stem != "library"]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        common = _common_fingerprint()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: _object(source, folder, common), sources))
        newest = max(path.stat().st_mtime for path in objects)
        if not library.exists() or library.stat().st_mtime < newest:
            part = library.with_suffix(".part")
            torch_library = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch_cpu"]
            _run([*_compiler(), "-shared", *map(str, objects), *torch_library, "-o", str(part)])
            part.rename(library)
    return library


def load() -> ModuleType:
    """The module with the emulator's switches; it brings the operators."""
    if SANITIZE and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        raise RuntimeError(f"SOFTDIMO_EMULATION_SANITIZE=1 needs LD_PRELOAD, as {__file__} says")
    spec = importlib.util.spec_from_file_location(NAME, build())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
