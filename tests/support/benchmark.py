"""Made-up results, and the smallest runs."""

from __future__ import annotations

from dataclasses import replace

from softdimo_fast.benchmark.results import Missing, Results, Row
from softdimo_fast.benchmark.settings import Settings

# Two cases in a second or two.
SMALLEST = Settings(
    quick=True, operators=("soft_embedding", "token_statistics"), shapes=("maskgit",),
    dtypes=("float32",), tiny=True,
)  # fmt: skip
# Text that must never be understood as HTML, or end a Markdown table's cell.
HOSTILE = "<script>alert('no')</script> | & \"quotes\""


def row(
    implementation: str,
    ratio: float,
    *,
    operator: str = "soft_embedding",
    shape: str = "maskgit",
    dtype: str = "float32",
    variant: str = "",
    phase: str = "both",
    allocator: str = "default",
    share: float | None = 0.5,
    error_value: float | None = 1e-7,
    extra_mib: float | None = 1.0,
) -> Row:
    """A row whose times follow from ours taking 10 ms."""
    return Row(
        allocator=allocator,
        operator=operator,
        shape=shape,
        variant=variant,
        dtype=dtype,
        phase=phase,
        implementation=implementation,
        backend="cpp" if implementation == "softdimo_fast" else "",
        rounds=9,
        median_ms=10 * ratio,
        low_ms=9.5 * ratio,
        high_ms=11 * ratio,
        ratio=ratio,
        ratio_low=0.9 * ratio,
        ratio_high=1.1 * ratio,
        floor_ms=5.0,
        bound="product",
        share=share,
        bytes=1000,
        flops=2000,
        exponentials=30,
        gbytes_per_s=0.1,
        gflop_per_s=0.2,
        extra_mib=extra_mib,
        error_value=error_value,
        error_gradient=2e-7,
    )


def made_up() -> Results:
    """A run with a bar that is met, one that is missed, a losing row, and something that did not run."""
    rows = []
    for allocator, factor in (("default", 1.0), ("thp", 0.5)):
        for phase in ("forward", "both"):
            rows += [
                row("softdimo_fast", 1.0, phase=phase, allocator=allocator),
                row("eager", 4.25 * factor, phase=phase, allocator=allocator),
                row("torch.compile", 0.875 * factor, phase=phase, allocator=allocator),
            ]
        more = {"shape": "maskgen-64", "allocator": allocator}
        rows += [row("softdimo_fast", 1.0, **more), row("eager", 8.125 * factor, **more)]
        one = {"operator": "sample_tokens", "phase": "forward", "allocator": allocator}
        rows += [
            row("softdimo_fast", 1.0, error_value=None, **one),
            row("softmax + multinomial", 2.75 * factor, error_value=None, **one),
        ]
    machine = {
        "processor": HOSTILE,
        "vendor": "AMD",
        "instruction sets": "AVX2, AVX-512",
        "threads": "2",
        "torch": "2.13.0",
        "commit": "0123456789ab",
        "date": "2026-01-02 03:04 UTC",
    }
    limits = {"copy": 64e9, "read": 68e9, "sgemm": 190e9, "bf16_gemm": 865e9, "exp": 6e9}
    return Results(
        rows=rows,
        missing=[Missing("token_divergence", "Liger", "its kernels need a CUDA device")],
        machine=machine,
        ceilings={"default": limits, "thp": {**limits, "copy": 65e9}},
        kernels={
            "soft_embedding": ["softdimo::soft_embedding, v4"],
            "sample_tokens": ["plain torch"],
        },
    )


def with_ratio(results: Results, factor: float, implementation: str) -> Results:
    """The same run, but one comparator's ratios are so many times what they were."""
    rows = [
        replace(one, ratio=factor * one.ratio) if one.implementation == implementation else one
        for one in results.rows
    ]
    return replace(results, rows=rows)
