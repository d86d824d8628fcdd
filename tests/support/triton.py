"""Where the Triton kernels are tested: on a device, or on the CPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from softdimo_fast.ops import _backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

needs_triton = pytest.mark.skipif(not _backends.TRITON_INSTALLED, reason="triton is not installed")
# On a device they are tests of the device, too.
where = [pytest.mark.gpu] if DEVICE == "cuda" else []
# The interpreter says what numpy computes with infinities and NaN on the way, and what it is itself.
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")
