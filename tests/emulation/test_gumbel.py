"""The noise of the CUDA kernels: a sum of two floats that is precise at both ends."""

from __future__ import annotations

from types import ModuleType

import torch


def test_gumbel_noise_in_two_floats(emulated: ModuleType) -> None:
    edges = torch.tensor(
        [2.0**-33, 1e-9, 2.0**-24, 0.5, 1 - 0.36787945, 1 - 2.0**-23, 1 - 2.0**-24]
    )
    uniforms = torch.cat([edges, 2.0 ** -torch.linspace(1, 30, 41), torch.rand(16)])
    found = torch.empty(64)
    for half in uniforms.view(2, 32):
        emulated.run_planted("noise", half.contiguous().data_ptr(), found.data_ptr())
        high, low = found.double().view(2, 32)
        truth = -torch.log(-torch.log1p(-half.double()))
        assert float(((high + low - truth) / truth.abs().clamp(min=1)).abs().max()) < 2e-8
        assert bool((high == (high + low).float()).all())
