"""Loads the compiled libraries. Importing this module registers every compiled operator with torch."""

from __future__ import annotations

import os
from pathlib import Path

import torch

# SOFTDIMO_LIBRARY_DIR loads another build of the same libraries, for instance one with sanitizers.
FOLDER = Path(os.environ.get("SOFTDIMO_LIBRARY_DIR") or Path(__file__).resolve().parent.parent)


def _load_cpu() -> None:
    path = FOLDER / "_cpu.so"
    if not path.is_file():
        raise ImportError(
            f"softdimo_fast is not built: {path} is missing. From a checkout run 'make install', or "
            "'pip install -e .' with torch >= 2.11 and a C++ compiler present."
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"softdimo_fast: {path} does not load with torch {torch.__version__} ({error}). "
            "It was built for another platform or needs torch >= 2.11; rebuild it with 'pip install -e .'."
        ) from error


def _load_cuda() -> str | None:
    """Why the CUDA library is not usable, or None when it is loaded. It loads without a device too."""
    path = FOLDER / "_cuda.so"
    if not path.is_file():
        return "this build has no CUDA library (no CUDA toolkit was found when it was built)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the CUDA library does not load with torch {torch.__version__}: {error}"
    return None


_load_cpu()
CUDA_OBSTACLE: str | None = _load_cuda()
# The first with asynchronous copies and bfloat16 products.
LEAST_CAPABILITY = (8, 0)


def cuda_obstacle(device: torch.device, shared_kilobytes: int = 48) -> str | None:
    """Why CUDA kernels whose blocks share so much memory do not run on ``device``; None where they do."""
    if CUDA_OBSTACLE is not None or not torch.cuda.is_available():
        return CUDA_OBSTACLE
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return (
            f"the CUDA kernels need compute capability {least} or later, {properties.name} has "
            f"{properties.major}.{properties.minor}"
        )
    allowed = properties.shared_memory_per_block_optin // 1024  # type: ignore[attr-defined]
    if allowed < shared_kilobytes:
        return (
            f"the CUDA kernels of this shape share {shared_kilobytes} KB in a block, {properties.name} "
            f"allows {allowed} KB"
        )
    return None


# What torch.compiler.assume_constant_result does, less its import of torch._dynamo (a second, and triton).
cuda_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def cpu_isa() -> str:
    """The instruction set whose kernels run: the best of this machine, or SOFTDIMO_CPU_ISA."""
    return str(torch.ops.softdimo.cpu_isa())


def cpu_vector_isa() -> str:
    """The instruction set of the kernels without matrix products: they have no bfloat16 variants."""
    isas = compiled_cpu_isas()
    return next(isa for isa in isas[isas.index(cpu_isa()) :] if not isa.endswith("-bf16"))


def has_tiles() -> bool:
    """Whether bfloat16 is multiplied in AMX tiles; a wrong SOFTDIMO_CPU_ISA is left to the first kernel."""
    try:
        return cpu_isa() == "amx-bf16"
    except RuntimeError:
        return False


def compiled_cpu_isas() -> list[str]:
    """The instruction sets compiled into this build, best first."""
    return str(torch.ops.softdimo.compiled_cpu_isas()).split()


def compiled_cuda_archs() -> list[str]:
    """The GPU architectures compiled into this build; none without a usable CUDA library."""
    if CUDA_OBSTACLE is not None:
        return []
    return str(torch.ops.softdimo.compiled_cuda_archs()).split()
