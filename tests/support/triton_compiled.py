"""Compiles the Triton kernels ahead of time, for devices that need not be there; prints what came out.

Run as a program without TRITON_INTERPRET: kernels that were imported for the interpreter cannot be compiled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language import bfloat16, float16

from softdimo_fast.ops.triton import (
    divergence,
    divergence_kernels,
    soft_embedding,
    soft_embedding_kernels,
)
from support import sass

CAPABILITIES = (80, 90)
HALF = {"bf16": bfloat16, "fp16": float16, "fp32": None}


class Build(NamedTuple):
    """A kernel as one call would compile it: types of the tensors and numbers, the rest constants."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    vocabulary: int
    codebook: str | None


def soft_embedding_builds(
    capability: int, logits: str, table: str, vocabulary: int, width: int, **options: bool
) -> Iterator[Build]:
    """The three kernels of a call; every option that is named is used."""
    narrow, everything = width <= 8, bool(options.get("everything"))
    shape = soft_embedding.tile(vocabulary, width, table != "fp32", everything, capability)
    common: dict[str, Any] = {
        "WIDTH": width, "BLOCK_N": shape.rows, "BLOCK_V": shape.vocabulary,
        "BLOCK_D": max(8 if narrow else 16, 1 << (width - 1).bit_length()), "NARROW": narrow,
        "INTERPRETED": False,
    }  # fmt: skip
    types = {
        "grad": f"*{table}", "logits": f"*{logits}", "codebook": f"*{table}", "mask": "*u8",
        "mask_embedding": f"*{table}", "row_temperature": "*fp32", "seed": "*i64", "row_ids": "*i64",
        "output": f"*{table}", "row_max": "*fp64", "row_sum": "*fp64", "soft": "*fp32",
        "dlogits": f"*{logits}", "dtemperature": "*fp32", "partial": "*fp64" if narrow else "*fp32",
        "rows": "i32", "split_rows": "i32", "vocabulary": "i32", "groups": "i32", "inner": "i64",
        "stride_outer": "i64", "stride_inner": "i64", "inverse": "fp32", "inverse_low": "fp32",
    }  # fmt: skip
    absent = {} if everything else dict.fromkeys(
        ("mask", "mask_embedding", "row_temperature", "seed", "row_ids", "dtemperature")
    )  # fmt: skip
    if table == "fp32" and not everything:
        absent["soft"] = None
    label = f"{logits} {table} V{vocabulary} D{width}{' everything' if everything else ''}"
    own = {
        "forward": {"HARD": everything, "HIGH": everything},
        "dlogits": {},
        "dcodebook": {"HALF": HALF[table], "HIGH": everything},
    }
    for part, constants in own.items():
        kernel = getattr(soft_embedding_kernels, f"soft_embedding_{part}_kernel")
        gone = absent if part == "forward" else {k: v for k, v in absent.items() if k != "soft"}
        yield Build(
            f"soft_embedding_{part} {label}", kernel, types, {**common, **constants, **gone},
            {"num_warps": shape.warps, "num_stages": shape.stages}, vocabulary, table,
        )  # fmt: skip


def divergence_builds(logits: str, vocabulary: int, **options: bool) -> Iterator[Build]:
    """Both kernels of a call, plain or with guidance, a mask and all gradients."""
    shape, everything = divergence.tile(vocabulary), bool(options.get("everything"))
    common = {
        "SAME": True, "STATISTICS": divergence.ROW_STATISTICS, "BLOCK_N": shape.rows,
        "BLOCK_V": shape.vocabulary, "INTERPRETED": False,
    }  # fmt: skip
    tensors = {"teacher", "model", "uncond", "dteacher", "dmodel", "duncond"}
    types = dict.fromkeys(tensors, f"*{logits}") | {
        "mask": "*u8", "row_guidance": "*fp32", "values": "*fp32", "statistics": "*fp64", "upstream": "*fp32",
        "rows": "i32", "vocabulary": "i32",
    }  # fmt: skip
    for letter in "abu":
        types |= {f"{name}_{letter}": "i64" for name in ("inner", "outer", "within")}
        types |= {f"{name}_{letter}": "fp32" for name in ("inverse", "inverse_low", "least")}
    types |= dict.fromkeys(("guidance", "forward_weight", "reverse_weight"), "fp32")
    gone = () if everything else ("uncond", "mask", "row_guidance", "dteacher", "duncond")
    for part in ("forward", "backward"):
        yield Build(
            f"divergence_{part} {logits} V{vocabulary}{' everything' if everything else ''}",
            getattr(divergence_kernels, f"divergence_{part}_kernel"), types,
            common | dict.fromkeys(gone), {"num_warps": shape.warps, "num_stages": 2}, vocabulary, None,
        )  # fmt: skip


def builds(capability: int) -> Iterator[Build]:
    """One of each path: tensor cores, float32, narrow; plain, and with every option."""
    for table, width in (("bf16", 64), ("fp32", 64), ("fp32", 7)):
        yield from soft_embedding_builds(capability, "bf16", table, 8192, width)
    yield from soft_embedding_builds(capability, "fp32", "fp16", 1025, 64, everything=True)
    yield from soft_embedding_builds(capability, "fp32", "fp32", 128, 7, everything=True)
    yield from divergence_builds("bf16", 8192)
    yield from divergence_builds("fp32", 1025, everything=True)


def compile_one(build: Build, capability: int) -> dict[str, Any]:
    """What the compiler says of a build."""
    names = build.kernel.arg_names
    constants = {name: value for name, value in build.constants.items() if name in names}
    types = {name: "constexpr" if name in constants else build.types[name] for name in names}
    # As a launch finds them: tensors aligned, lengths and strides where V allows for it.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if types[name].startswith("*")
        or (
            build.vocabulary % 16 == 0
            and name.startswith(("stride_", "outer_", "within_", "vocabulary"))
        )
    }
    source = ASTSource(fn=build.kernel, signature=types, constexprs=constants, attrs=aligned)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=build.options
    )
    ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
    machine = sass.only_kernel(compiled.asm["cubin"])
    return {
        "kernel": build.name,
        "vocabulary": build.vocabulary,
        "codebook": build.codebook,
        "capability": capability,
        "registers": machine.registers,
        "local": machine.count("STL|LDL"),
        "shared": compiled.metadata.shared,
        "products": machine.count("HMMA|HGMMA"),
        "tf32": "tf32" in ptx or "tf32" in ttgir,
        "atomics": machine.count(r"ATOM|RED\b"),
        "loads_128": machine.count(r"LDG\.E.*\.128") + machine.count(r"LDGSTS.*\.128"),
        "instructions": machine.count(""),
    }


if __name__ == "__main__":
    for capability in CAPABILITIES:
        for build in builds(capability):
            print(json.dumps(compile_one(build, capability)), flush=True)
    sys.exit(0)
