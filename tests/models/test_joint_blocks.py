"""The sinusoids of text families: the frequencies that torch gives on every processor, on every processor."""

from __future__ import annotations

import json

import pytest
import torch
from support.process import run_python

from softdimo_fast.models.joint_blocks import sinusoid

PLAIN = """
import json, math, torch
index = torch.arange(128, dtype=torch.float32)
print(json.dumps({str(p): torch.exp(-math.log(p) * index / 128).tolist() for p in (1e4, 1e3)}))
"""


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch computes without MKL")
def test_frequencies_are_those_of_torch_on_the_path_of_every_processor() -> None:
    result = run_python("-c", PLAIN, environment={"MKL_CBWR": "COMPATIBLE"})
    assert result.returncode == 0, result.stderr
    for max_period, frequencies in json.loads(result.stdout).items():
        # At a small argument x a sine is x: the waves show the frequencies, bit for bit.
        tiny = torch.tensor([2.0**-60])
        waves = sinusoid(tiny, 256, max_period=float(max_period), sine_first=True)
        assert (waves[0, :128] * 2.0**60).tolist() == frequencies
