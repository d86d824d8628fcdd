"""token_statistics: accuracy, masks, special rows, torch integration, and the choice of a kernel."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checks import assert_same_bits, operators_run, thread_count
from support.contract import assert_contract
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from softdimo_fast.ops import _library
from softdimo_fast.ops._explain import explain
from softdimo_fast.ops.token_statistics import TokenStatistics, token_statistics

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REFERENCE, KERNEL = "softdimo_reference::token_statistics", "softdimo::token_statistics"
BACKENDS = ("reference", "cpp")


def composed(logits: Tensor, temperature: float | Tensor) -> TokenStatistics:
    """What a user would write."""
    if isinstance(temperature, Tensor):
        temperature = temperature[..., None]
    scaled = logits / temperature
    p, log_p = torch.softmax(scaled, -1), torch.log_softmax(scaled, -1)
    entropy = -torch.where(p > 0, p * log_p, 0).sum(-1)
    return TokenStatistics(torch.logsumexp(scaled, -1), entropy, p.amax(-1))


def exact_entropy(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """In float64, with the arg-max entry's -log p taken as log1p of the others' mass."""
    if isinstance(temperature, Tensor):
        temperature = temperature[..., None]
    shifted = (logits.double() - logits.double().amax(-1, keepdim=True)) / temperature
    odds = shifted.exp()
    rest = odds.scatter(-1, logits.argmax(-1, keepdim=True), 0).sum(-1, keepdim=True)
    terms = torch.where(odds > 0, odds * (torch.log1p(rest) - shifted), 0)
    return (terms / (1 + rest)).sum(-1)


def assert_same(first: TokenStatistics, second: TokenStatistics) -> None:
    for name, a, b in zip(TokenStatistics._fields, first, second, strict=True):
        assert_same_bits(a, b, name)


# --------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    shape=st.sampled_from([(300,), (4, 80), (2, 3, 50)]),
    vocabulary=st.sampled_from([1, 2, 7, 33, 500, 1025]),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([1e-3, 0.7, 1.0, 1e3, "rows"]),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    masked=st.booleans(),
)
def test_contract(
    backend: str, shape: tuple[int, ...], vocabulary: int, dtype: torch.dtype,
    temperature: float | str, scale: float, masked: bool,
) -> None:  # fmt: skip
    logits = (scale * torch.randn(*shape, 2 * vocabulary)).clamp(-6e4, 6e4).to(dtype)[..., ::2]
    t = torch.rand(shape) + 0.5 if isinstance(temperature, str) else temperature
    mask = torch.rand(shape) > 0.2 if masked else None
    found = token_statistics(logits, temperature=t, mask=mask, backend=backend)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    wide_t = t.double() if isinstance(t, Tensor) else t
    truth = composed(logits.double(), wide_t)._replace(entropy=exact_entropy(logits, wide_t))
    yard = composed(logits, t.to(dtype) if isinstance(t, Tensor) else t)
    for name, ours, theirs, exact in zip(TokenStatistics._fields, found, yard, truth, strict=True):
        assert ours.dtype == compute
        assert ours.shape == shape
        if mask is not None:
            assert not bool(ours[~mask].any())
            ours, theirs, exact = ours[mask], theirs[mask], exact[mask]
        assert_contract(ours, theirs, exact, what=name)


def test_known_laws() -> None:
    flat, certain, coin = torch.zeros(8), torch.full((8,), -torch.inf), torch.full((8,), -torch.inf)
    certain[3], coin[:2] = 5.0, 1.0
    found = token_statistics(torch.stack([flat, certain, coin]))
    torch.testing.assert_close(
        found.log_normalizer, torch.tensor([math.log(8), 5.0, 1 + math.log(2)])
    )
    torch.testing.assert_close(found.entropy, torch.tensor([math.log(8), 0.0, math.log(2)]))
    torch.testing.assert_close(found.max_prob, torch.tensor([1 / 8, 1.0, 0.5]))


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4, 3e6])
def test_a_common_offset_changes_the_log_normalizer_alone(offset: float) -> None:
    logits = torch.randint(-20, 20, (50, 64)).float() / 4
    base, moved = token_statistics(logits), token_statistics(logits + offset)
    assert_same_bits(base.entropy, moved.entropy)
    assert_same_bits(base.max_prob, moved.max_prob)
    torch.testing.assert_close(moved.log_normalizer.double() - offset, base.log_normalizer.double(),
                               rtol=0, atol=2e-7 * max(abs(offset), 10))  # fmt: skip


@pytest.mark.parametrize("gap", [5.0, 25.0, 60.0])
def test_entropy_of_an_almost_certain_row_keeps_its_digits(gap: float) -> None:
    small = math.exp(-gap)
    expected = (math.log1p(small) + small * (math.log1p(small) + gap)) / (1 + small)
    found = token_statistics(torch.tensor([1e3 - gap, 1e3]))
    assert float(found.entropy) == pytest.approx(expected, rel=1e-5, abs=0)


def test_temperature_rows_equal_numbers_and_broadcast() -> None:
    logits = torch.randn(3, 4, 9)
    found = token_statistics(logits, temperature=torch.tensor([0.5, 1.0, 4.0])[:, None])
    for i, value in enumerate([0.5, 1.0, 4.0]):
        part = TokenStatistics(*(statistic[i] for statistic in found))
        assert_same(part, token_statistics(logits[i], temperature=value))


def test_temperature_divides_the_logits() -> None:
    logits = torch.randn(256, 20)
    assert_same(token_statistics(logits, temperature=0.5), token_statistics(logits * 2))


# --------------------------------------------------------------------------------------------------
# Masks, special rows, shapes


def test_rows_that_do_not_count_are_never_read() -> None:
    logits = torch.randn(4, 5, 6)
    mask = torch.rand(4, 5) > 0.5
    clean = token_statistics(logits, mask=mask)
    for garbage in (torch.nan, torch.inf, -torch.inf):
        dirty = torch.where(mask[..., None], logits, garbage)
        assert_same(token_statistics(dirty, mask=mask), clean)
    assert not any(bool(statistic[~mask].any()) for statistic in clean)
    full = token_statistics(logits)
    for one, other in zip(clean, full, strict=True):
        assert_same_bits(one[mask], other[mask])


def test_masks_of_one_value_and_broadcast_masks() -> None:
    logits = torch.randn(4, 5, 6)
    assert_same(
        token_statistics(logits, mask=torch.ones(4, 5, dtype=torch.bool)), token_statistics(logits)
    )
    nothing = token_statistics(logits * torch.nan, mask=torch.zeros(1, dtype=torch.bool))
    assert not any(bool(statistic.any()) for statistic in nothing)
    column = torch.tensor([True, False, True, True])[:, None]
    assert_same(
        token_statistics(logits, mask=column), token_statistics(logits, mask=column.expand(4, 5))
    )


def test_rows_without_a_distribution_are_nan_and_stay_alone() -> None:
    logits = torch.randn(6, 5)
    clean = token_statistics(logits)
    logits[0, 2], logits[1, 0], logits[2] = torch.nan, torch.inf, -torch.inf
    found = token_statistics(logits)
    for statistic, before in zip(found, clean, strict=True):
        assert bool(statistic[:3].isnan().all())
        assert_same_bits(statistic[3:], before[3:])
    for value in (torch.nan, torch.inf, -torch.inf):
        single = token_statistics(torch.tensor([[value]]))
        assert all(bool(statistic.isnan().all()) for statistic in single)


def test_bad_temperature_rows() -> None:
    """On the CPU in eager they raise; where values are not looked at the row becomes NaN."""
    logits, temperature = torch.randn(4, 5), torch.tensor([1.0, 0.0, -1.0, torch.nan])
    with pytest.raises(ValueError, match="token_statistics: temperature must be positive"):
        token_statistics(logits, temperature=temperature)
    for shape in ((4, 5), (4, 1)):
        values = logits[:, : shape[1]]
        for library, backend in (("softdimo_reference", "reference"), ("softdimo", "cpp")):
            operator = getattr(torch.ops, library).token_statistics
            found = operator(values, 1.0, temperature, None)
            expected = token_statistics(values, backend=backend)
            for statistic, clean in zip(found, expected, strict=True):
                assert bool(statistic[1:].isnan().all())
                assert_same_bits(statistic[:1], clean[:1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_temperature_rows_are_flat_over_what_is_there(backend: str) -> None:
    logits = torch.tensor([[1.0, -torch.inf, 3.0], [0.0, 1.0, 2.0]])
    found = token_statistics(logits, temperature=torch.full((2,), torch.inf), backend=backend)
    torch.testing.assert_close(found.entropy, torch.tensor([2.0, 3.0]).log())
    torch.testing.assert_close(found.max_prob, torch.tensor([1 / 2, 1 / 3]))


@pytest.mark.parametrize("shape", [(1,), (0, 5), (3, 0, 2), (1, 1)])
def test_small_shapes(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape)
    found = token_statistics(logits)
    assert all(statistic.shape == shape[:-1] for statistic in found)
    if shape[-1] == 1:
        torch.testing.assert_close(found.log_normalizer, logits[..., 0])
        assert not bool(found.entropy.any())
        assert bool((found.max_prob == 1).all())


def test_strides_do_not_matter_and_outputs_are_fresh() -> None:
    logits = torch.randn(40, 9)
    expected = token_statistics(logits)
    padded = torch.full((40, 12), torch.nan)
    padded[:, :9] = logits
    assert_same(token_statistics(padded[:, :9]), expected)
    torch.testing.assert_close(token_statistics(logits.t().contiguous().t()), expected)
    expanded = token_statistics(logits[:1].expand(40, 9), mask=torch.ones(40, dtype=torch.bool))
    assert all(len({v.item() for v in statistic}) == 1 for statistic in expanded)
    assert all(statistic.is_contiguous() for statistic in expanded)


# --------------------------------------------------------------------------------------------------
# torch


def test_nothing_is_differentiated_and_autocast_is_ignored() -> None:
    logits = torch.randn(30, 9, requires_grad=True)
    temperature = torch.full((30,), 0.7, requires_grad=True)
    found = token_statistics(logits, temperature=temperature)
    assert not any(statistic.requires_grad for statistic in found)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(token_statistics(logits, temperature=temperature), found)


def example(masked: bool) -> tuple[Callable[[Tensor], TokenStatistics], Tensor]:
    temperature = torch.rand(6) + 0.5
    mask = torch.tensor([True, False, True, True, False, True]) if masked else None
    return (
        lambda logits: token_statistics(logits, temperature=temperature, mask=mask),
        torch.randn(6, 8),
    )


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked: bool) -> None:
    mask = torch.rand(2, 3) > 0.5 if masked else None
    for library in (torch.ops.softdimo_reference, torch.ops.softdimo):
        operator = library.token_statistics.default
        for row_temperature in (None, torch.rand(2, 3) + 0.5, torch.rand(3).double() + 0.5):
            torch.library.opcheck(operator, (torch.randn(2, 3, 5), 0.7, row_temperature, mask))


@pytest.mark.parametrize("masked", [False, True])
def test_compile_gives_the_same_bits(masked: bool) -> None:
    torch._dynamo.reset()
    call, logits = example(masked)
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    found = compiled(logits)
    assert isinstance(found, TokenStatistics)
    assert_same(found, call(logits))
    assert_same(compiled(logits[:, :5]), call(logits[:, :5]))


def test_export_keeps_the_operator() -> None:
    call, logits = example(masked=True)

    class Module(torch.nn.Module):
        def forward(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return tuple(call(logits))

    program = torch.export.export(Module(), (logits,))
    assert any("token_statistics" in str(node.target) for node in program.graph.nodes)
    assert_same(TokenStatistics(*program.module()(logits)), call(logits))


def test_vmap_and_jvp_raise_clearly() -> None:
    logits = torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match=r"token_statistics does not support torch\.vmap"):
        torch.func.vmap(token_statistics)(logits)
    with pytest.raises(RuntimeError, match="logits carries a forward-mode tangent"):
        torch.func.jvp(token_statistics, (logits,), (logits,))


# --------------------------------------------------------------------------------------------------
# Which kernel


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_their_batch_or_on_threads(dtype: torch.dtype) -> None:
    """V beyond one chunk, and rows for several threads."""
    logits = (4 * torch.randn(90, 1500)).to(dtype)
    temperature = torch.rand(90) + 0.5
    found = token_statistics(logits, temperature=temperature, backend="cpp")
    for rows in (slice(3, 4), slice(50, 90)):
        part = token_statistics(logits[rows], temperature=temperature[rows], backend="cpp")
        assert_same(part, TokenStatistics(*(statistic[rows] for statistic in found)))
    with thread_count(3):
        assert_same(token_statistics(logits, temperature=temperature, backend="cpp"), found)


def test_cpu_tensors_run_the_cpp_kernel() -> None:
    logits = torch.randn(3, 4)
    assert operators_run(lambda: token_statistics(logits)) == [KERNEL]
    assert operators_run(lambda: token_statistics(logits, backend="reference")) == [REFERENCE]
    explanation = explain(token_statistics, logits, mask=torch.ones(3, dtype=torch.bool))
    assert explanation.backend == "cpp"
    assert explanation.notes == ()
    assert "stride 3" in explain(token_statistics, torch.randn(4, 3).t()).notes[0]
    assert explanation.bytes == 12 * 4 + 3 * 3 * 4
    assert explanation.exponentials == 12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide_temperature", [False, True])
def test_cuda_tensors_run_the_kernel_where_it_can(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, wide_temperature: bool
) -> None:
    """On fake tensors: the choice, and that the kernel's fake agrees with the reference's."""
    monkeypatch.setattr(_library, "CUDA_OBSTACLE", None)
    taken = dtype != torch.float64 and not wide_temperature
    with FakeTensorMode():
        logits = torch.empty(2, 3, 5, dtype=dtype, device="cuda")
        wide = torch.float64 if wide_temperature else torch.float32
        temperature = torch.empty(3, dtype=wide, device="cuda")
        explanation = explain(token_statistics, logits, temperature=temperature)
        found: list[TokenStatistics] = []
        names = operators_run(
            lambda: found.append(token_statistics(logits, temperature=temperature))
        )
        if not taken:
            with pytest.raises(ValueError, match=r"backend='cuda' cannot run: .* float64"):
                token_statistics(logits, temperature=temperature, backend="cuda")
    assert explanation.backend == ("cuda" if taken else "reference")
    assert names == [KERNEL if taken else REFERENCE]
    expected = torch.float32 if taken else torch.float64
    for statistic in found[0]:
        assert statistic.shape == (2, 3)
        assert statistic.dtype == expected
        assert statistic.device.type == "cuda"


def test_without_the_cuda_library_cuda_tensors_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "CUDA_OBSTACLE", "this build has no CUDA library")
    with FakeTensorMode():
        logits = torch.empty(3, 5, device="cuda")
        explanation = explain(token_statistics, logits)
        with pytest.raises(ValueError, match="'cuda' cannot run: this build has no CUDA library"):
            token_statistics(logits, backend="cuda")
    assert explanation.backend == "reference"
    assert "this build has no CUDA library" in explanation.reason


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_device_it_agrees_with_the_cpu(dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(300, 1030)).to(dtype)[:, :1025]
    logits[0, 3], logits[1] = torch.nan, -torch.inf
    mask, temperature = torch.rand(300) > 0.2, torch.rand(300) + 0.5
    expected = token_statistics(logits, temperature=temperature, mask=mask)
    found = token_statistics(logits.cuda(), temperature=temperature.cuda(), mask=mask.cuda())
    for statistic, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(statistic.cpu(), truth, equal_nan=True, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "logits must be a torch.Tensor, got list"),
        ({"logits": torch.ones(3, dtype=torch.int64)}, TypeError, "logits must have dtype"),
        ({"logits": torch.tensor(1.0)}, ValueError, r"logits must have shape \[..., V\]"),
        ({"logits": torch.ones(3, 0)}, ValueError, "logits must have a vocabulary V >= 1"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": math.nan}, ValueError, "temperature must be finite"),
        ({"temperature": "1"}, TypeError, "temperature must be a float, got str"),
        ({"temperature": torch.ones(5)}, ValueError, "temperature must broadcast to the rows"),
        ({"temperature": torch.ones(3, device="meta")}, ValueError, "temperature is on meta"),
        ({"mask": [True]}, TypeError, "mask must be a bool tensor or None, got list"),
        ({"mask": torch.ones(3)}, TypeError, "mask must have dtype bool"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, "mask must broadcast to the rows"),
        ({"backend": "fast"}, ValueError, "backend must be None or one of"),
        ({"backend": "triton"}, ValueError, "backend='triton' cannot run: .* no Triton kernel"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' cannot run: .* need CUDA tensors"),
    ],
)
def test_bad_arguments_are_named(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    logits = options.pop("logits", torch.randn(3, 4))
    with pytest.raises(error, match="token_statistics: " + message):
        token_statistics(logits, **options)  # type: ignore[arg-type]
