"""Reads compiled kernels without a GPU: registers, local memory and instructions, by cuobjdump.

    python tests/support/sass.py softdimo_fast/_cuda.so

cuobjdump comes with a CUDA toolkit, with triton, or with `pip install nvidia-cuda-cuobjdump
nvidia-cuda-nvdisasm` (5.5 MB).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Kernel:
    """One kernel as compiled for one architecture."""

    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    instructions: Counter[str] = field(default_factory=Counter)

    def count(self, pattern: str) -> int:
        """How many instructions have an opcode that `pattern` matches from its start."""
        return sum(n for opcode, n in self.instructions.items() if re.match(pattern, opcode))


def find_cuobjdump() -> str | None:
    candidates = [shutil.which("cuobjdump")]
    candidates += [str(path) for path in sorted(Path("/usr/local").glob("cuda*/bin/cuobjdump"))]
    site = Path(sysconfig.get_path("purelib"))
    candidates += [str(path) for path in sorted(site.glob("nvidia/cu*/bin/cuobjdump"))]
    triton = importlib.util.find_spec("triton")
    for folder in (triton.submodule_search_locations or []) if triton else []:
        candidates.append(f"{folder}/backends/nvidia/bin/cuobjdump")
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def _cuobjdump(*arguments: str) -> str:
    tool = find_cuobjdump()
    if tool is None:
        raise FileNotFoundError(f"no cuobjdump was found; {__doc__}")
    # It calls nvdisasm, which lies beside it.
    env = {**os.environ, "PATH": f"{os.path.dirname(tool)}:{os.environ.get('PATH', '')}"}
    command = [tool, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


def architectures(library: Path) -> set[str]:
    """What the library holds: sm_80 is machine code, compute_80 is PTX."""
    found = set()
    for option, prefix in (("-lelf", "sm_"), ("-lptx", "compute_")):
        # Entries read "1.sm_90a.cubin" and "2.sm_80.ptx".
        for number in re.findall(r"\.sm_(\d+[a-z]?)\.", _cuobjdump(option, str(library))):
            found.add(prefix + number)
    return found


def kernels(library: Path, architecture: str) -> dict[str, Kernel]:
    """The kernels compiled for an architecture, by readable names."""
    found: dict[str, Kernel] = {}
    name, wanted = "", False
    for line in _cuobjdump("-res-usage", str(library)).splitlines():
        if match := re.match(r"\s*arch = (\S+)", line):
            wanted = match[1] == architecture
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif wanted and (
            match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line)
        ):
            registers, stack, shared, local = map(int, match.groups())
            found[readable(name)] = Kernel(registers, stack, local, shared)
    for line in _cuobjdump("-sass", "-arch", architecture, str(library)).splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            name = readable(match[1])
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            found[name].instructions[match[1]] += 1
    return found


def readable(mangled: str) -> str:
    """``..._kernelI13__nv_bfloat16Li8EE...`` as ``..._kernel<__nv_bfloat16, 8>``: types and numbers."""
    match = re.search(r"\d([a-z_]+_kernel)(?:I(.*?)EE)?(?=[vE])", mangled)
    if match is None:
        return mangled
    arguments, rest = [], match[2] or ""
    while rest:
        if number := re.match(r"L[a-z](n?\d+)E?", rest):
            arguments.append(number[1])
            rest = rest[number.end() :]
        elif length := re.match(r"\d+", rest):
            end = length.end() + int(length[0])
            arguments.append(rest[length.end() : end])
            rest = rest[end:]
        else:
            arguments.append({"f": "float", "d": "double"}[rest[0]])
            rest = rest[1:]
    return f"{match[1]}<{', '.join(arguments)}>" if arguments else match[1]


def _main(library: Path) -> None:
    columns = (
        "registers",
        "stack",
        "local",
        "shared",
        "all",
        "LDG.128",
        "LDS",
        "HMMA",
        "HGMMA",
        "BAR",
    )
    print(f"{'kernel':44}" + "".join(f"{column:>10}" for column in columns))
    for architecture in sorted(name for name in architectures(library) if name.startswith("sm_")):
        print(architecture)
        for name, kernel in sorted(kernels(library, architecture).items()):
            row = (
                kernel.registers, kernel.stack, kernel.local, kernel.shared, kernel.count(""),
                kernel.count(r"LDG\.E.*\.128"), kernel.count("LDS"), kernel.count("HMMA"),
                kernel.count("HGMMA"), kernel.count("BAR"),
            )  # fmt: skip
            print(f"  {name:42}" + "".join(f"{value:10}" for value in row))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
