"""Reads compiled kernels without a GPU: registers, local memory and instructions, by cuobjdump.

    python tests/support/sass.py softdimo_fast/_cuda.so

prints a table. `occupancy` there is the share of a multiprocessor's warps that registers and static shared
memory leave room for.

cuobjdump comes with a CUDA toolkit, with triton, or with `pip install nvidia-cuda-cuobjdump
nvidia-cuda-nvdisasm` (5.5 MB).
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
# Instructions, by what they are there for.
COUNTED = {
    "loads_128": r"LDG\.E.*\.128",
    "stores_128": r"STG\.E.*\.128",
    "asynchronous_copies": r"LDGSTS",
    "matrix_loads": r"LDSM",
    "matrix_products": r"HMMA",
    "barriers": r"BAR",
    "atomics": r"ATOM(?!S)|RED(?!UX)",  # of global memory
}

# Letters for types, and what letters make of the type behind them.
_BUILTIN = {
    "v": "void", "b": "bool", "c": "char", "a": "signed char", "h": "unsigned char", "s": "short",
    "t": "unsigned short", "i": "int", "j": "unsigned", "l": "long", "m": "unsigned long",
    "x": "long long", "y": "unsigned long long", "f": "float", "d": "double",
}  # fmt: skip
_QUALIFIED = {"P": "{}*", "R": "{}&", "O": "{}&&", "K": "const {}", "V": "volatile {}"}


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
            # From sm_90 on, the 1 KB that is the system's in each block is counted in.
            if shared and not architecture.startswith("sm_8"):
                shared -= 1024
            found[readable(name)] = Kernel(registers, stack, local, shared)
    for line in _cuobjdump("-sass", "-arch", architecture, str(library)).splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            name = readable(match[1])
        elif match := _OPCODE.match(line):
            found[name].instructions[match[1]] += 1
    return found


def only_kernel(cubin: bytes) -> Kernel:
    """The kernel in machine code of one architecture."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert match, usage
    registers, stack, shared, local = map(int, match.groups())
    return Kernel(registers, stack, local, shared, Counter(_OPCODE.findall(code)))


class _Symbol:
    """A symbol of a kernel, read from left to right.

    The mangling of the Itanium C++ ABI, as far as kernels need it: types, numbers, enumerators, template
    types and packs, and back references to what came before. Namespaces are left out of what is shown.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._seen: list[
            str
        ] = []  # what a back reference may mean: S_ is the first, S0_ the second

    def take(self, pattern: str) -> str | None:
        """What matches here, passed over."""
        match = re.compile(pattern).match(self._text, self._at)
        if match is None:
            return None
        self._at = match.end()
        return match[0]

    def expect(self, pattern: str) -> str:
        found = self.take(pattern)
        if found is None:
            raise ValueError(f"{self._text}: expected {pattern} at {self._at}")
        return found

    def name(self) -> str:
        """A name's last part, and that part's template arguments."""
        nested = self.take("N[rVK]*") is not None
        name = ""
        while True:
            if self.take("St"):
                name = "std"
            elif reference := self.take("S[0-9A-Z]*_"):
                name = self._seen[int(reference[1:-1], 36) + 1 if len(reference) > 2 else 0]
            elif self.take("I"):
                name += self._arguments()
                self._seen.append(name)
            else:
                name = self._source_name()
                self._seen.append(name)
            if nested and self.take("E"):
                return name
            if not nested and name != "std" and not self._is_next("I"):
                return name

    def _is_next(self, character: str) -> bool:
        return self._text.startswith(character, self._at)

    def _source_name(self) -> str:
        length = int(self.expect(r"\d+"))
        start, self._at = self._at, self._at + length
        return self._text[start : self._at]

    def _arguments(self) -> str:
        """Behind the I, and past the E."""
        return f"<{', '.join(self._list())}>"

    def _list(self) -> list[str]:
        found: list[str] = []
        while not self.take("E"):
            if self.take("J"):
                found += self._list()
            elif self.take("L"):
                self._type()
                found.append(self.expect(r"n?\d+").replace("n", "-"))
                self.expect("E")
            else:
                found.append(self._type())
        return found

    def _type(self) -> str:
        if builtin := self.take(f"[{''.join(_BUILTIN)}]"):
            return _BUILTIN[builtin]
        if qualifier := self.take(f"[{''.join(_QUALIFIED)}]"):
            shown = _QUALIFIED[qualifier].format(self._type())
            self._seen.append(shown)
            return shown
        return self.name()


def readable(symbol: str) -> str:
    """``..._kernelI13__nv_bfloat16Li8EE...`` as ``..._kernel<__nv_bfloat16, 8>``; true is 1, false is 0.

    Other symbols stay as they are.
    """
    reader = _Symbol(symbol)
    try:
        reader.expect("_Z")
        name = reader.name()
    except (IndexError, ValueError):
        return symbol
    return name if re.match(r"[a-z]\w*_kernel(<|$)", name) else symbol


def block_sizes(library: Path, architecture: str) -> dict[str, int]:
    """The threads per block that kernels declare by __launch_bounds__."""
    found: dict[str, int] = {}
    name, next_value = "", False
    for line in _cuobjdump("-elf", "-arch", architecture, str(library)).splitlines():
        if match := re.match(r"\.nv\.info\.(\S+)", line):
            name = readable(match[1])
        elif "EIATTR_MAX_THREADS" in line:
            next_value = True
        elif next_value and (match := re.match(r"\s*Value:((?:\s+0x[0-9a-f]+)+)", line)):
            found[name] = math.prod(int(size, 16) for size in match[1].split())
            next_value = False
    return found


def occupancy(kernel: Kernel, threads: int, architecture: str) -> float:
    """The share of a multiprocessor's 64 warps that can be there at a time, for blocks of that size.

    As registers and static shared memory allow; dynamic shared memory is not in the machine code.
    """
    warps = math.ceil(threads / 32)
    by_registers = 4 * (16384 // (256 * math.ceil(kernel.registers * 32 / 256)))
    shared = 128 * math.ceil((kernel.shared + 1024) / 128)  # 1 KB is the system's
    by_shared = (164 if architecture == "sm_80" else 228) * 1024 // shared
    return min(32, 64 // warps, by_registers // warps, by_shared) * warps / 64


def _main(library: Path) -> None:
    columns = ["registers", "stack", "local", "shared", "occupancy", "instructions", *COUNTED]
    for architecture in sorted(name for name in architectures(library) if name.startswith("sm_")):
        sizes = block_sizes(library, architecture)
        found = sorted(kernels(library, architecture).items())
        width = max(len(name) for name, _ in found)
        print(f"{architecture:{width}}  " + "  ".join(columns))
        for name, kernel in found:
            threads = sizes.get(name)
            share = f"{occupancy(kernel, threads, architecture):.0%}" if threads else "-"
            row = [
                kernel.registers,
                kernel.stack,
                kernel.local,
                kernel.shared,
                share,
                kernel.count(""),
            ]
            row += [kernel.count(pattern) for pattern in COUNTED.values()]
            cells = [f"{value:>{len(column)}}" for value, column in zip(row, columns, strict=True)]
            print(f"{name:{width}}  " + "  ".join(cells))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
