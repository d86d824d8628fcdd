"""What was measured on: processor, versions, commit, date."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

from softdimo_fast._version import __version__
from softdimo_fast.ops import _library

# A processor's flags that decide which kernels run, as readers know them.
FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "amx_bf16": "AMX BF16",
}
VENDORS = {"GenuineIntel": "Intel", "AuthenticAMD": "AMD"}


def facts(device: str, threads: int) -> dict[str, str]:
    """Names and values for the report, in its order."""
    processor = _cpuinfo()
    found = {
        "processor": processor.get("model name", platform.processor() or platform.machine()),
        "vendor": vendor(processor),
        "instruction sets": ", ".join(features(processor)) or "unknown",
        "cores": str(os.cpu_count()),
        "threads": str(threads),
        "huge pages": _huge_pages(),
        "load": f"{os.getloadavg()[0]:.1f} processes in the minute before",
    }
    if device == "cuda":
        found |= _device_facts()
    return found | {
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "MKL, oneDNN": _libraries(),
        "softdimo_fast": __version__,
        "C++ kernels": _library.cpu_isa(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def vendor(processor: dict[str, str]) -> str:
    """Intel, AMD, or what the processor calls itself."""
    name = processor.get("vendor_id", "unknown")
    return VENDORS.get(name, name)


def features(processor: dict[str, str]) -> list[str]:
    """The instruction sets that matter here."""
    flags = set(processor.get("flags", "").split())
    return [name for flag, name in FEATURES.items() if flag in flags]


def mkl_sentence(found: dict[str, str]) -> str:
    """Which part of a float32 ratio is MKL's choice of instructions and not ours."""
    wide = "AVX-512" in found["instruction sets"].split(", ")
    general = (
        "On AMD processors MKL runs float32 products on AVX2, at half of what AVX-512 can do. Ours use "
        "AVX-512 there, so that up to 2.3x of a float32 ratio that is bound by a product is MKL's choice. "
    )
    if found["vendor"] == "AMD":
        here = "This processor is AMD's" + (": it is so here." if wide else ", without AVX-512.")
    elif found["vendor"] == "Intel":
        here = f"This processor is Intel's, {'with' if wide else 'without'} AVX-512: it is not so here."
    else:
        here = f"This processor's vendor is {found['vendor']}."
    if "AMX BF16" in found["instruction sets"]:
        here += (
            " It has AMX, which torch's bfloat16 products use, at several times the float32 rate."
        )
    return general + here


def commit() -> str:
    """Of the checkout that the package lies in, with a word where files were changed; else "unknown"."""
    folder = Path(__file__).resolve().parent.parent.parent
    found = _git(folder, "rev-parse", "--short=12", "HEAD")
    if not found or _git(folder, "ls-files", "--", "softdimo_fast/__init__.py") == "":
        return "unknown"
    return found + (", changed" if _git(folder, "status", "--porcelain", "-uno") else "")


def _git(folder: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines; empty where there are none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _huge_pages() -> str:
    """The kernel's setting: always, madvise or never."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    return text.partition("[")[2].partition("]")[0] or "unknown"


def _libraries() -> str:
    """The versions of the libraries that torch's products run on."""
    lines = torch.__config__.show().splitlines()
    found = [
        line.strip(" -").split(" for ")[0].split(" (Git")[0]
        for line in lines
        if "Math Kernel Library" in line or "MKL-DNN" in line
    ]
    shorter = [
        line.replace("Intel(R) oneAPI Math Kernel Library Version", "MKL")
        .replace("Intel(R) Math Kernel Library Version", "MKL")
        .replace("-Product Build", " build")
        .replace("Intel(R) MKL-DNN", "oneDNN")
        for line in found
    ]
    return ", ".join(shorter) or "none"


def _device_facts() -> dict[str, str]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    found = {
        "device": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability "
        f"{properties.major}.{properties.minor}",
        "CUDA": str(torch.version.cuda),
    }
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
            found["driver"] = str(pynvml.nvmlSystemGetDriverVersion())
            clock = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
            found["clock"] = f"{clock} MHz when the run began"
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # nvidia-ml-py is optional, and may find no driver: the run does not need it
        pass
    return found
