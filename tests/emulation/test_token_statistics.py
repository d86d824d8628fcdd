"""The CUDA kernel of token_statistics, run on the CPU: values, layouts, special rows, order of threads."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checks import assert_same_bits
from support.contract import assert_contract
from torch import Tensor

from softdimo_fast.ops.reference import token_statistics as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARIES = (1, 7, 8, 31, 128, 129, 1000, 1025, 8192)
OK, INVALID_VALUE, INVALID_CONFIGURATION = 0, 1, 9
GUARD = 12345.0


class Statistics(NamedTuple):
    log_normalizer: Tensor
    entropy: Tensor
    max_prob: Tensor


def call(
    emulated: ModuleType, address: int, dtype: torch.dtype, rows: int, vocabulary: int, row_stride: int, *,
    mask: Tensor | None = None, temperature: float | Tensor = 1.0, schedule: str = "greedy",
) -> tuple[int, Statistics]:  # fmt: skip
    """The launcher's error code, and the outputs: NaN where nothing was written, with guards around."""
    storage = torch.full((3, rows + 2), GUARD)
    storage[:, 1 : rows + 1] = torch.nan
    outputs = Statistics(*storage[:, 1 : rows + 1])
    arguments: dict[str, object] = {}
    if mask is not None:
        arguments.update(mask=mask.data_ptr(), mask_stride=mask.stride(0))
    if isinstance(temperature, Tensor):
        arguments.update(
            row_temperature=temperature.data_ptr(), row_temperature_stride=temperature.stride(0)
        )
    else:
        arguments.update(temperature=temperature)
    emulated.set_schedule(getattr(emulated.Schedule, schedule))
    code = emulated.token_statistics(
        logits=address,
        dtype=getattr(emulated.DType, str(dtype).removeprefix("torch.")),
        rows=rows,
        vocabulary=vocabulary,
        row_stride=row_stride,
        log_normalizer=outputs.log_normalizer.data_ptr(),
        entropy=outputs.entropy.data_ptr(),
        max_prob=outputs.max_prob.data_ptr(),
        **arguments,
    )
    assert bool((storage[:, [0, -1]] == GUARD).all()), "the kernel wrote past the end of an output"
    return code, outputs


def statistics(
    emulated: ModuleType, logits: Tensor, *, mask: Tensor | None = None, temperature: float | Tensor = 1.0,
    schedule: str = "greedy",
) -> Statistics:  # fmt: skip
    """Of [N, V] with contiguous rows and any row stride.

    The emulator throws when a logit is read that is not of a counted row.
    """
    assert logits.stride(1) == 1 or logits.shape[1] == 1
    code, outputs = call(
        emulated, logits.data_ptr(), logits.dtype, *logits.shape, logits.stride(0), mask=mask,
        temperature=temperature, schedule=schedule,
    )  # fmt: skip
    assert code == OK
    return outputs


def assert_same(first: Statistics, second: Statistics) -> None:
    for name, a, b in zip(Statistics._fields, first, second, strict=True):
        assert_same_bits(a, b, name)


def composed(logits: Tensor, temperature: float | Tensor) -> Statistics:
    """What a user would write, in float32."""
    scaled = logits.float() / (
        temperature[:, None] if isinstance(temperature, Tensor) else temperature
    )
    p, log_p = torch.softmax(scaled, -1), torch.log_softmax(scaled, -1)
    entropy = -torch.where(p > 0, p * log_p, 0).sum(-1)
    return Statistics(torch.logsumexp(scaled, -1), entropy, p.amax(-1))


def exact(logits: Tensor, temperature: float | Tensor, mask: Tensor | None = None) -> Statistics:
    if isinstance(temperature, Tensor):
        return Statistics(*reference.token_statistics(logits.double(), 1.0, temperature, mask))
    return Statistics(*reference.token_statistics(logits.double(), temperature, None, mask))


def assert_accurate(found: Statistics, logits: Tensor, temperature: float | Tensor) -> None:
    truth, yardstick = exact(logits, temperature), composed(logits, temperature)
    for name, ours, theirs, true in zip(Statistics._fields, found, yardstick, truth, strict=True):
        assert_contract(ours, theirs, true, what=name)


def bits(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory in which every number is NaN, to cut views out of."""
    return torch.full((rows, columns), torch.nan, dtype=dtype)


# ---------------------------------------------------------------------------------------------------
# values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_float64_and_order_of_threads(
    emulated: ModuleType, dtype: torch.dtype, vocabulary: int
) -> None:
    """From flat rows to one-hot ones, and the same bits whichever warp and lane goes first."""
    scales = torch.tensor([0.0, 0.01, 1.0, 5.0, 50.0, 1000.0])
    logits = (torch.randn(258, vocabulary) * scales.repeat(43)[:, None]).to(dtype)
    greedy = statistics(emulated, logits, temperature=0.8)
    assert_same(greedy, statistics(emulated, logits, temperature=0.8, schedule="reverse"))
    assert_accurate(greedy, logits, 0.8)
    for row in range(len(scales)):
        assert_accurate(
            Statistics(*(part[row :: len(scales)] for part in greedy)),
            logits[row :: len(scales)],
            0.8,
        )


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
def test_temperature(emulated: ModuleType, temperature: float) -> None:
    logits = 3 * torch.randn(256, 300)
    assert_accurate(statistics(emulated, logits, temperature=temperature), logits, temperature)


@pytest.mark.parametrize("vocabulary", [300, 2300])
def test_temperature_of_each_row(emulated: ModuleType, vocabulary: int) -> None:
    logits, temperatures = 3 * torch.randn(256, vocabulary), 10 ** torch.linspace(-3, 3, 512)[::2]
    found = statistics(emulated, logits, temperature=temperatures)
    assert_accurate(found, logits, temperatures)
    every = statistics(emulated, logits, temperature=torch.full((1,), 0.7).expand(256))
    assert_same(every, statistics(emulated, logits, temperature=0.7))


def test_logits_far_from_zero(emulated: ModuleType) -> None:
    """A common offset of 1e4 leaves entropy and confidence to the last bit: differences come first."""
    logits = torch.randint(-64, 64, (256, 500)) / 8.0
    near, far = statistics(emulated, logits), statistics(emulated, logits + 1e4)
    assert_same_bits(near.entropy, far.entropy, "entropy")
    assert_same_bits(near.max_prob, far.max_prob, "max_prob")


def test_nearly_one_hot(emulated: ModuleType) -> None:
    """The relative error of a tiny entropy: log(1 + rest) and the sum are both small and both precise."""
    logits = torch.randn(256, 1000)
    logits[:, 3] = 30
    found, truth = statistics(emulated, logits), exact(logits, 1.0)
    assert float(truth.entropy.max()) < 1e-7
    assert float((found.entropy / truth.entropy - 1).abs().max()) < 2e-6


@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 40),
    vocabulary=st.integers(1, 5000),
    padding=st.integers(0, 9),
    offset=st.integers(0, 9),
    scale=st.sampled_from([0.1, 3.0, 100.0]),
    masked=st.booleans(),
)
def test_any_layout(
    emulated: ModuleType, dtype: torch.dtype, rows: int, vocabulary: int, padding: int, offset: int,
    scale: float, masked: bool,
) -> None:  # fmt: skip
    memory = bits(rows, vocabulary + padding + offset, dtype)
    logits = memory[:, offset : offset + vocabulary]
    logits.copy_(scale * torch.randn(rows, vocabulary))
    temperature = torch.rand(rows) + 0.5
    mask = torch.rand(rows) > 0.3 if masked else None
    if mask is not None:
        logits[~mask] = torch.nan
    found = statistics(emulated, logits, temperature=temperature, mask=mask)
    truth = exact(logits, temperature, mask)
    for ours, true in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=3e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------
# a row's bits depend on the row alone


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 8, 31, 128, 129, 1025, 4111])
def test_bits_do_not_depend_on_the_place(
    emulated: ModuleType, dtype: torch.dtype, vocabulary: int
) -> None:
    """Alone and in a batch, at every address modulo 16, in padded rows; the NaN around is not read."""
    logits = torch.randn(19, vocabulary).to(dtype)
    expected = statistics(emulated, logits)
    alone = [statistics(emulated, row[None].clone()) for row in logits]
    assert_same(Statistics(*(torch.cat(part) for part in zip(*alone, strict=True))), expected)
    for offset in range(16 // logits.element_size()):
        for padding in (0, 1, 5):
            view = bits(19, offset + vocabulary + padding, dtype)[:, offset : offset + vocabulary]
            view.copy_(logits)
            assert_same(statistics(emulated, view), expected)
    expanded = statistics(emulated, logits[:1].expand(19, -1))
    assert_same(expanded, Statistics(*(part[:1].expand(19) for part in expected)))


def test_rows_more_than_four_gigabytes_apart(emulated: ModuleType) -> None:
    """Offsets are 64-bit. The memory between the rows is promised by the system, not filled."""
    stride = 2**31 + 8
    logits = torch.randn(3, 100).bfloat16()
    with reserved(2 * (2 * stride + 100)) as address:
        for row in range(3):
            ctypes.memmove(address + 2 * row * stride, logits[row].data_ptr(), 200)
        code, found = call(emulated, address, torch.bfloat16, 3, 100, stride)
    assert code == OK
    assert_same(found, statistics(emulated, logits))


@contextmanager
def reserved(size: int) -> Iterator[int]:
    """The address of `size` bytes of memory, of which pages exist once they are touched."""
    no_reserve = 0x4000  # Linux; Python names it from 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    area = mmap.mmap(-1, size, flags=flags)
    view = ctypes.c_char.from_buffer(area)
    try:
        yield ctypes.addressof(view)
    finally:
        del view
        area.close()


# ---------------------------------------------------------------------------------------------------
# masks and special rows


@pytest.mark.parametrize("vocabulary", [100, 2300])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_mask_strides(emulated: ModuleType, vocabulary: int, step: int) -> None:
    logits = torch.randn(40, vocabulary)
    memory = torch.rand(3 * 40) > 0.5
    mask = memory.as_strided((40,), (step,))
    expected = statistics(emulated, logits)
    found = statistics(emulated, logits, mask=mask)
    assert_same(found, Statistics(*(torch.where(mask, part, 0.0) for part in expected)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [5, 100, 1025, 4200])
def test_special_rows(emulated: ModuleType, dtype: torch.dtype, vocabulary: int) -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.randn(12, vocabulary).to(dtype)
    logits[0] = -inf  # nothing to choose from
    logits[1] = -inf
    logits[1, -1] = 2.5  # one-hot
    logits[2, 1:] = -inf  # one-hot, the first
    logits[3, ::2] = -inf
    logits[4, -1] = nan
    logits[5, 0] = nan
    logits[6, 2] = inf
    logits[7, :2] = inf
    logits[8] = -inf
    logits[8, 3] = nan
    logits[9] = 3.0  # uniform
    found = statistics(emulated, logits)
    truth = exact(logits, 1.0)
    for name, ours, true in zip(Statistics._fields, found, truth, strict=True):
        lost = torch.tensor([row in (0, 4, 5, 6, 7, 8) for row in range(12)])
        assert torch.equal(ours.isnan(), lost), name
        torch.testing.assert_close(
            ours.double(), true, rtol=1e-6, atol=1e-6, equal_nan=True, msg=name
        )
    assert [float(part[1]) for part in found] == [2.5, 0.0, 1.0]
    assert [float(part[2]) for part in found] == [float(logits[2, 0]), 0.0, 1.0]


def test_finite_extremes(emulated: ModuleType) -> None:
    """Differences that overflow are a probability of zero, not NaN."""
    logits = torch.tensor([[3e38, -3e38, -3e38], [-3e38, -3e38, -3e38], [3e38, 3e38, -torch.inf]])
    found = statistics(emulated, logits, temperature=0.9)
    torch.testing.assert_close(found.entropy, torch.tensor([0.0, 3.0, 2.0]).clamp(min=1).log())
    torch.testing.assert_close(found.max_prob, torch.tensor([1.0, 1 / 3, 0.5]))


@pytest.mark.parametrize("vocabulary", [100, 2300])
def test_bad_temperature_loses_its_row_alone(emulated: ModuleType, vocabulary: int) -> None:
    logits = torch.randn(7, vocabulary)
    temperature = torch.tensor([1.0, 0.0, -1.0, torch.nan, 1e-40, -torch.inf, 1.0])
    found = statistics(emulated, logits, temperature=temperature)
    expected = statistics(emulated, logits)
    good = torch.tensor([True, False, False, False, False, False, True])
    for ours, plain in zip(found, expected, strict=True):
        assert torch.equal(ours.isnan(), ~good)
        assert torch.equal(ours[good], plain[good])
    assert all(bool(part.isnan().all()) for part in statistics(emulated, logits, temperature=-1.0))


# ---------------------------------------------------------------------------------------------------
# the launcher


def test_no_rows_launches_nothing(emulated: ModuleType) -> None:
    before = emulated.launches()
    code, _ = call(emulated, 0, torch.float32, 0, 100, 100)
    assert code == OK
    assert emulated.launches() == before


@pytest.mark.parametrize(
    ("dtype", "vocabulary"),
    [(torch.float32, 0), (torch.float32, 2**30 + 1), (torch.float64, 100)],
)
def test_what_it_cannot_run_is_refused(
    emulated: ModuleType, dtype: torch.dtype, vocabulary: int
) -> None:
    before = emulated.launches()
    code, _ = call(emulated, 0, dtype, 2, vocabulary, vocabulary)
    assert code == INVALID_VALUE
    assert emulated.launches() == before


def test_more_blocks_than_a_grid_holds(emulated: ModuleType) -> None:
    """2^32 + 1 blocks of 16 rows, which would wrap to one: refused before anything is read or written."""
    code = emulated.token_statistics(
        logits=0, dtype=emulated.DType.float32, rows=2**36 + 16, vocabulary=8, row_stride=8,
        log_normalizer=0, entropy=0, max_prob=0,
    )  # fmt: skip
    assert code == INVALID_CONFIGURATION


# ---------------------------------------------------------------------------------------------------
# the binding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operator_takes_any_layout(emulated: ModuleType, dtype: torch.dtype) -> None:
    """Transposed rows, padded columns, a broadcast mask and temperatures of another dtype."""
    logits = (3 * torch.randn(3, 5, 40)).to(dtype).transpose(0, 1)[..., 1:37]
    mask = torch.rand(3) > 0.3
    temperature = (torch.rand(5, 1, dtype=torch.float64) + 0.5).expand(5, 3)
    before = emulated.launches()
    found = Statistics(
        *torch.ops.softdimo_emulated.token_statistics(logits, 1.0, temperature, mask)
    )
    assert emulated.launches() == before + 1
    expected = statistics(
        emulated,
        logits.reshape(15, 36),
        mask=mask.expand(5, 3).reshape(15),
        temperature=temperature.float().reshape(15),
    )
    assert_same(Statistics(*(one.reshape(15) for one in found)), expected)


def test_the_operator_refuses_what_it_cannot_read(emulated: ModuleType) -> None:
    operator = torch.ops.softdimo_emulated.token_statistics
    with pytest.raises(RuntimeError, match="logits must be float32, bfloat16 or float16"):
        operator(torch.randn(2, 3, dtype=torch.float64), 1.0, None, None)
    with pytest.raises(RuntimeError, match="mask must broadcast to the rows"):
        operator(torch.randn(2, 3), 1.0, None, torch.ones(3, dtype=torch.bool))
