"""What the report says beside its numbers."""

from __future__ import annotations

TITLE = "softdimo_fast, measured"
INTRODUCTION = (
    "Every number over ours is another implementation's time divided by ours, measured in the "
    "same rounds of the same process: above 1 ours is faster, below 1 it loses."
)
ALLOCATORS = {"default": "default allocator", "thp": "huge pages (THP)"}
CEILINGS = {
    "copy": ("copy, bytes read and written", "GB/s"),
    "read": ("read", "GB/s"),
    "sgemm": ("float32 product", "GFLOP/s"),
    "bf16_gemm": ("bfloat16 product", "GFLOP/s"),
    "exp": ("exp in cache", "G/s"),
}
METRICS = {
    "share": "share of the ceiling",
    "error": "error of the value",
    "memory": "extra MiB a thread",
}
CEILING_WORDS = (
    "The best rates of torch's own simplest calls on this machine, on the same threads, "
    "measured before anything else in the process. A share of the ceiling is the least time "
    "that memory or products allow by these rates, over the measured time. A kernel that "
    "multiplies faster than torch's product, or stores past the cache, can pass 100 %."
)
BAR_WORDS = (
    "What the project aims at. A bar that is missed is shown here and fails no test; times are never "
    "judged, only ratios, shares, errors and memory. At the floor: what the ratio would be if ours took no "
    "more than the least time by the measured ceilings. A bar above that is out of reach of any kernel here."
)
METHOD = (
    (
        "Rounds",
        "All implementations of a case take turns in one process, in an order that rotates. "
        "Times are medians, with the 20 % and 80 % quantiles; ratios are medians of the rounds' "
        "own ratios. Garbage collection is off inside a round, and results are freed after the "
        "clock has stopped.",
    ),
    (
        "Phases",
        "Forward runs without a graph. Both is forward with a graph, then backward to every "
        "input that trains; backward is the second part of that same call.",
    ),
    (
        "Inputs",
        "Normal logits of standard deviation 3, temperature 0.9 where an operator has one, 64 % "
        "of the positions masked in the losses. float32 and bfloat16 are the dtypes of every "
        "tensor; autocast has bfloat16 logits, and float32 tables that autocast casts.",
    ),
    (
        "THP",
        "A second process with THP_MEM_ALLOC_ENABLE=1: torch then asks for huge pages. Half of "
        "eager's time at large vocabularies is page faults of fresh tensors, which huge pages "
        "mostly remove, for both sides.",
    ),
    (
        "Least work",
        "Bytes, operations and exponentials of forward are those of softdimo_fast.explain: "
        "every input read once, every output written once; of losses and attention only rows, "
        "keys and queries that count. Backward reads inputs and the arriving gradient again, "
        "writes each gradient once, and makes one product for each gradient of a product's "
        "operand (attention: five products for forward's two). A loss can make its gradient in "
        "the pass that reads its inputs, so both reads once, and backward alone has no floor.",
    ),
    (
        "Memory",
        "The largest resident size of the process during one call (on CUDA: torch's allocator), "
        "beyond what was there before it and the results. Resolution about 0.1 MiB. Measured "
        "with the default allocator only.",
    ),
    (
        "Errors",
        "Distance to the eager expression in float64 on the same inputs, over its norm, of all "
        "entries; of several gradients the worst. Under autocast the rounding of the tables is "
        "part of it.",
    ),
    (
        "On CUDA",
        "Device time between events, after the L2 cache was overwritten and while the host had "
        "a millisecond's lead; launches are not in it.",
    ),
)
