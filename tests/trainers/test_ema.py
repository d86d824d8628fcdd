"""Averages of weights: the profiles, the warm start, and what is averaged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from softdimo_fast.trainers import Ema, EmaConfig


def test_the_warm_start() -> None:
    config = EmaConfig(decay=0.9999)
    kept = [config.kept(step) for step in range(4)]
    assert kept == pytest.approx([0.1, 2 / 11, 0.25, 4 / 13])
    assert config.kept(10**6) == 0.9999
    # (1 + s) / (10 + s) reaches 0.9999 at s = 89990.
    assert config.kept(89_989) < 0.9999 == config.kept(89_990)
    assert EmaConfig(decay=0.99, warm_start=False).kept(0) == 0.99


def test_the_power_profile() -> None:
    config = EmaConfig(profile="power", exponent=6.94, warm_start=False)
    assert config.kept(0) == 0
    assert [config.kept(step) for step in (1, 9)] == pytest.approx([0.5**7.94, 0.9**7.94])
    # Its closed form: after t steps the weights of step s count as s^gamma, up to normalisation.
    average, total, gamma = 0.0, 4000, 6.94
    for step in range(total):
        average = config.kept(step) * average + (1 - config.kept(step)) * step
    assert average / total == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)


def test_parameters_are_averaged_and_buffers_copied() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).train()
    ema = Ema(module, EmaConfig(decay=0.5))
    assert not ema.module.training
    assert not any(p.requires_grad for p in ema.module.parameters())
    expected = {name: p.detach().clone() for name, p in module.named_parameters()}
    for step in range(4):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p))
        module(torch.randn(5, 2))  # moves the running statistics
        ema.update(module, step)
        kept = min(0.5, (1 + step) / (10 + step))
        for name, p in module.named_parameters():
            expected[name] = kept * expected[name] + (1 - kept) * p.detach()
    for name, value in expected.items():
        torch.testing.assert_close(ema.module.get_parameter(name).data, value)
    for name, buffer in module.named_buffers():
        assert torch.equal(ema.module.get_buffer(name), buffer), name
    assert int(ema.module.get_buffer("1.num_batches_tracked")) == 4


def test_equal_weights_stay_equal_to_the_last_bit() -> None:
    module = nn.Linear(7, 5)
    ema = Ema(module, EmaConfig())
    for step in (0, 1, 5, 1000, 10**6):
        ema.update(module, step)
        assert torch.equal(ema.module.weight, module.weight)
