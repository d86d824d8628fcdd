"""The numerics contract: our error against float64 is at most twice that of the composed torch expression.

The truth is the float64 reference on the inputs upcast. The yardstick is the expression a user would
write in the same dtype. A floor allows for a few roundings where the yardstick happens to be exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOORS = {
    torch.float64: 1e-12,
    torch.float32: 3e-7,
    torch.float16: 5e-4,
    torch.bfloat16: 2e-3,
}


def relative_errors(value: Tensor, truth: Tensor) -> tuple[float, float]:
    """The error in norm and in max, each over the size of the truth."""
    wide, error = truth.double(), value.double() - truth.double()
    if not wide.numel():
        return 0.0, 0.0
    norm = float(error.norm() / wide.norm().clamp(min=1e-300))
    largest = float(error.abs().max() / wide.abs().max().clamp(min=1e-300))
    return norm, largest


def assert_contract(
    ours: Tensor,
    yardstick: Tensor,
    truth: Tensor,
    *,
    floor: float | None = None,
    what: str = "value",
) -> None:
    """``ours`` keeps the contract: error <= 2 x the yardstick's + floor, in norm and in max."""
    floor = FLOORS[ours.dtype] if floor is None else floor
    assert ours.shape == truth.shape, f"{what}: shape {ours.shape}, expected {truth.shape}"
    assert torch.equal(ours.isnan(), truth.isnan()), f"{what}: NaN in other places than in float64"
    if float(truth.double().norm()) == 0:
        assert float(ours.double().abs().max() if ours.numel() else 0) <= floor, f"{what}: not zero"
        return
    finite = truth.isfinite() & yardstick.isfinite()
    ours, yardstick, truth = ours[finite], yardstick[finite], truth[finite]
    for kind, mine, theirs in zip(
        ("norm", "max"),
        relative_errors(ours, truth),
        relative_errors(yardstick, truth),
        strict=True,
    ):
        assert mine <= 2 * theirs + floor, (
            f"{what}: {kind} error {mine:.3g} exceeds 2 x {theirs:.3g} (torch) + {floor:.3g}"
        )
