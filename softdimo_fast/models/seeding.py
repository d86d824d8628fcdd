"""Building modules whose initial weights depend on a seed alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Modules built inside draw their initial weights from ``seed``, and leave torch's generator as it was.

    ``with seeded(7): layer = nn.Linear(3, 4)`` gives the same layer whatever was drawn before it. Weights
    are drawn on the CPU even under another default device, so that they are the same on all (the meta
    device, which draws nothing, is kept): move the module afterwards.

    Args:
        seed: an int in [-2^63, 2^64).

    Raises:
        TypeError: seed is no int.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seeded: seed must be an int, got {type(seed).__name__}")
    device = "meta" if torch.get_default_device().type == "meta" else "cpu"
    # torch.manual_seed would also reseed the accelerators' generators, which fork_rng keeps only at the
    # cost of waiting for each device.
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.default_generator.manual_seed(seed)
        yield
