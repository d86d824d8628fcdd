"""soft_embedding on Triton against the float64 specification, on a device or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checks import (
    assert_compiles_bitwise,
    assert_exports,
    assert_same_bits,
    gradients,
    operators_run,
)
from support.soft_embedding import Case, assert_close_to_float64, strided
from support.triton import DEVICE, DTYPES, needs_triton, quiet, where
from torch import Tensor

from softdimo_fast import explain, soft_embedding
from softdimo_fast.ops.reference import random as specification
from softdimo_fast.ops.triton import layout
from softdimo_fast.ops.triton import soft_embedding as kernels

pytestmark = [needs_triton, quiet, *where]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def call(z: Tensor, e: Tensor, **options: Any) -> Tensor:
    return soft_embedding(z, e, backend="triton", **options)


def make_case(
    rows: tuple[int, ...], vocabulary: int, width: int, logits: torch.dtype, table: torch.dtype,
    *, scale: float = 3.0, groups: int | None = None, mask: bool = False, temperature: Any = 1.0,
    **options: Any,
) -> Case:  # fmt: skip
    """A case on the device."""
    rows = rows if groups is None else (*rows, groups)
    z = (randn(*rows, vocabulary) * scale).to(logits)
    codebook = randn(*(() if groups is None else (groups,)), vocabulary, width).to(table)
    per_row = embedding = None
    if temperature == "rows":
        per_row = torch.rand(rows, device=DEVICE) + 0.5
    else:
        options["temperature"] = temperature
    if mask:
        options["mask"] = torch.rand(rows, device=DEVICE) < 0.4
        embedding = randn(*codebook.shape[:-2], width).to(table)
    return Case(z, codebook, per_row, embedding, options)


# ---------------------------------------------------------------------------------------------------
# values and gradients


@pytest.mark.parametrize(
    ("table", "width"),
    [(torch.float32, width) for width in (1, 7, 9, 33)]
    + [(torch.bfloat16, 8), (torch.bfloat16, 33), (torch.float16, 7), (torch.float16, 16)],
)
def test_float64(table: torch.dtype, width: int) -> None:
    """Narrow and wide codebooks of each dtype; V ends within a tile."""
    assert_close_to_float64(make_case((257,), 45, width, table, table), "triton")


@pytest.mark.parametrize("width", [65, 128])
def test_wide_codebooks(width: int) -> None:
    assert_close_to_float64(make_case((256,), 30, width, torch.float32, torch.float32), "triton")


@pytest.mark.parametrize(
    ("logits", "table"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.float16),
    ],
)
def test_every_option_at_once(logits: torch.dtype, table: torch.dtype) -> None:
    """Mixed dtypes, groups, mask, a temperature of each row, noise."""
    case = make_case(
        (8, 16), 33, 12, logits, table, groups=2, mask=True, temperature="rows", noise="gumbel", seed=-7
    )  # fmt: skip
    assert_close_to_float64(case, "triton")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Shapes, dtypes, layouts, masks, temperatures and scales up to nearly one-hot rows."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    temperature = 10.0 ** draw(st.floats(-3, 3))
    scale = draw(st.sampled_from([0.1, 1.0, 5.0, 30.0, 1e4]))
    case = make_case(
        (16, 16), draw(st.integers(1, 70)), draw(st.integers(1, 24)), draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(DTYPES)), scale=min(scale * max(temperature, 1e-2), 1e4),
        mask=draw(st.booleans()), temperature=temperature,
    )  # fmt: skip
    options = dict(case.options)
    if draw(st.booleans()):
        options |= {"noise": "gumbel", "seed": draw(st.integers(-(2**63), 2**63 - 1))}
    form = draw(st.sampled_from(["contiguous", "padded", "transposed", "columns"]))
    return case._replace(logits=strided(case.logits, form), options=options)


@given(case=cases())
@settings(max_examples=3)
def test_contract(case: Case) -> None:
    assert_close_to_float64(case, "triton")


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_nearly_one_hot_rows(distance: float) -> None:
    """Where max p is 1 - distance, and torch's own gradient of the dominant entry cancels."""
    rows, vocabulary, width = 256, 70, 12
    logits = torch.randn(rows, vocabulary, dtype=torch.float64)
    winner = torch.randint(vocabulary, (rows, 1))
    others = torch.logsumexp(logits.scatter(1, winner, -torch.inf), dim=1, keepdim=True)
    logits = logits.scatter(1, winner, others + torch.log(torch.tensor((1 - distance) / distance)))
    case = Case(logits.float().to(DEVICE), randn(vocabulary, width), None, None, {})
    assert_close_to_float64(case, "triton")
    upstream = randn(rows, width)
    _, (dlogits, _) = gradients(case.call("triton"), case.tensors(), upstream)
    wide = [tensor.double() for tensor in case.tensors()]
    _, (truth, _) = gradients(case.call("reference"), wide, upstream.double())
    winner = winner.to(DEVICE)
    relative = (dlogits - truth).abs().gather(1, winner) / truth.abs().gather(1, winner)
    assert float(relative.median()) < 2e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logit_gradients_sum_to_zero(dtype: torch.dtype) -> None:
    logits = (randn(64, 70) * torch.logspace(-1, 1.5, 64, device=DEVICE)[:, None]).to(dtype)
    codebook, upstream = randn(70, 16).to(dtype), randn(64, 16)
    _, (dlogits, _) = gradients(call, (logits, codebook), upstream)
    rounding = torch.finfo(dtype).eps * dlogits.double().abs().sum(dim=1)
    size = upstream.norm(dim=1) * float(codebook.float().norm(dim=1).max())
    products = torch.finfo(torch.float32).eps * size
    assert bool((dlogits.double().sum(dim=1).abs() <= rounding + 2 * products).all())


@pytest.mark.parametrize("width", [7, 16])
def test_temperature_gradient_of_nearly_uniform_rows(width: int) -> None:
    """The rounding of delta is common to a row's dlogits: about max y it would add up over V."""
    temperature = torch.rand(256, device=DEVICE) + 0.5
    case = Case(0.1 * randn(256, 70), randn(70, width), temperature, None, {})
    assert_close_to_float64(case, "triton")


def test_narrow_sums_that_cancel() -> None:
    """Over the vocabulary and over rows: float32 sums would have the error of their largest terms."""
    codebook = randn(130, 1)
    codebook[-1] -= codebook.double().sum().float() - 0.01
    value = call(torch.zeros(3, 130, device=DEVICE), codebook)
    truth = codebook.double().mean().expand(3, 1)
    torch.testing.assert_close(value.double(), truth, rtol=3e-7, atol=0)
    upstream = randn(300, 1)
    upstream[-1] -= upstream.double().sum().float() - 0.01
    zeros, one = torch.zeros(300, 1, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    _, (gradient,) = gradients(lambda e: call(zeros, e), (one,), upstream)
    torch.testing.assert_close(gradient.double(), upstream.double().sum(0, True), rtol=3e-7, atol=0)


def test_a_large_product_early_in_a_long_sum() -> None:
    """What is added after it would be rounded at its size."""
    logits, codebook = randn(64, 1000), randn(1000, 16)
    logits[:, 0] = 6.0
    truth = soft_embedding(logits.double(), codebook.double(), backend="reference")
    assert float((call(logits, codebook).double() - truth).norm() / truth.norm()) < 2e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_high_precision(dtype: torch.dtype) -> None:
    """Two terms of p: the float32 soft value that backward keeps is nearly exact."""
    logits, codebook = randn(64, 40).to(dtype), randn(40, 16).to(dtype)
    truth = soft_embedding(logits.double(), codebook.double(), backend="reference")
    errors = []
    for high in (False, True):
        *_, soft = torch.ops.softdimo_triton.soft_embedding(
            logits, codebook, 1.0, None, None, None, None, None, high, False
        )
        errors.append(float((soft.double() - truth).norm() / truth.norm()))
    assert errors[1] < 1e-5 < 1e-4 < errors[0]


@pytest.mark.parametrize("width", [3, 12])
def test_splits_of_the_rows(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The codebook's gradient from several ranges of rows, the last one shorter, with [MASK] rows."""
    monkeypatch.setattr(kernels, "_SPLIT_ROWS", 64)
    assert kernels.split_count(300) == 4
    assert_close_to_float64(
        make_case((300,), 17, width, torch.float32, torch.float32, mask=True), "triton"
    )


def test_hard_is_the_argmax_embedding_with_the_soft_gradient() -> None:
    logits, codebook, upstream = randn(60, 70), randn(70, 12), randn(60, 12)
    options: dict[str, Any] = {"noise": "gumbel", "seed": 5, "temperature": 0.7}
    hard, hard_grads = gradients(
        lambda z, e: call(z, e, hard=True, **options), (logits, codebook), upstream
    )
    _, soft_grads = gradients(lambda z, e: call(z, e, **options), (logits, codebook), upstream)
    ids, seed = torch.arange(60, device=DEVICE), torch.tensor([5, 0], device=DEVICE)
    noised = logits.double() + specification.gumbel(seed, ids, 70, torch.float64)
    assert_same_bits(hard, codebook[noised.argmax(-1)])
    for mine, soft in zip(hard_grads, soft_grads, strict=True):
        assert_same_bits(mine, soft)
    ties = torch.zeros(3, 150, device=DEVICE)
    ties[1, [70, 149]] = 2.0
    assert_same_bits(call(ties, torch.eye(150, device=DEVICE)[:, :100], hard=True).argmax(-1),
                     torch.tensor([0, 70, 0], device=DEVICE))  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# noise


def test_the_bits_of_the_noise() -> None:
    """Any seed, offset and row number: the uniforms of the specification, bit for bit."""
    from support.triton_kernels import fill_uniform

    ids = torch.tensor([0, 1, 2**32 + 3, 2**62 + 12345], device=DEVICE)
    for pair in ([0, 0], [1, 2], [-(2**63), 2**32 + 9], [2**63 - 1, -1]):
        seed = torch.tensor(pair, device=DEVICE)
        out = torch.empty(4, 64, device=DEVICE)
        fill_uniform[(1,)](seed, ids, out, N=4, V=32)
        assert_same_bits(out, specification.uniform(seed, ids, 64))


def test_logarithms_and_exponentials() -> None:
    """To the digits that their descriptions promise."""
    from support.triton_kernels import fill_exponential, fill_gumbel

    seed = torch.tensor([3, 4], device=DEVICE)
    out = torch.empty(16, 1024, dtype=torch.float64, device=DEVICE)
    fill_gumbel[(1,)](seed, out, N=16, V=1024)
    ids = torch.arange(16, device=DEVICE)
    truth = specification.gumbel(seed, ids, 1024, torch.float64)
    torch.testing.assert_close(out, truth, rtol=1e-11, atol=1e-11)
    x = -torch.logspace(-8, 2, 1024, device=DEVICE)
    x[:4] = torch.tensor([0.0, -torch.inf, torch.nan, -87.0])
    found = torch.empty_like(x)
    fill_exponential[(1,)](x, found, N=1024)
    true = torch.where(x < -87, 0.0, x.double().exp())
    torch.testing.assert_close(found.double(), true, rtol=3e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize(("size", "temperature"), [(1e4, 1.0), (0.0, 1e-3)])
def test_noise_keeps_its_digits(size: float, temperature: float) -> None:
    """Beside large logits, whose float32 spacing is 1e-3; at a temperature that magnifies its rounding."""
    logits, codebook = torch.full((256, 40), size, device=DEVICE), randn(40, 16)
    for hard in (False, True):
        options = {"noise": "gumbel", "seed": 3, "temperature": temperature, "hard": hard}
        value = call(logits, codebook, **options)
        truth = soft_embedding(logits.double(), codebook.double(), backend="reference", **options)
        torch.testing.assert_close(value.double(), truth, rtol=0, atol=2e-6)


def test_row_ids_key_the_noise() -> None:
    logits, codebook = torch.zeros(6, 40, device=DEVICE), torch.eye(40, device=DEVICE)
    ids = torch.arange(6, device=DEVICE)
    base = call(logits, codebook, noise="gumbel", seed=7)
    assert_same_bits(base, call(logits, codebook, noise="gumbel", seed=7, row_ids=ids))
    flipped = call(logits, codebook, noise="gumbel", seed=7, row_ids=ids.flip(0))
    assert_same_bits(base.flip(0), flipped)


# ---------------------------------------------------------------------------------------------------
# rows, special values, layouts


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float32, 5), (torch.float32, 17), (torch.bfloat16, 17)]
)
def test_rows_do_not_depend_on_the_batch(dtype: torch.dtype, width: int) -> None:
    rows, vocabulary = (700, 1100) if DEVICE == "cuda" else (70, 100)
    logits, upstream = (randn(rows, vocabulary) * 3).to(dtype), randn(rows, width)
    codebook, ids = randn(vocabulary, width).to(dtype), torch.arange(rows, device=DEVICE)

    def run(pick: Tensor) -> tuple[Tensor, Tensor]:
        value, (dlogits,) = gradients(
            lambda z: call(z, codebook, noise="gumbel", seed=3, row_ids=ids[pick], temperature=0.8),
            (logits[pick],),
            upstream[pick],
        )
        return value, dlogits

    value, dlogits = run(ids)
    for pick in (ids[:1], ids[5:9], torch.randperm(rows).to(DEVICE), ids[::3]):
        part, dpart = run(pick)
        assert_same_bits(part, value[pick])
        assert_same_bits(dpart, dlogits[pick])


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("width", [6, 16])
def test_special_values_stay_in_their_row(width: int, hard: bool) -> None:
    logits = randn(8, 200)
    logits[1, 17] = torch.nan
    logits[2] = -torch.inf
    logits[3, :150] = -torch.inf
    logits[4, 180] = torch.inf
    logits[5, :90] = -torch.inf
    logits[5, 100] = torch.nan
    codebook = randn(200, width)
    value, (dlogits, _) = gradients(lambda z, e: call(z, e, hard=hard), (logits, codebook))
    broken = [False, True, True, False, True, True, False, False]
    assert value.isnan().all(dim=1).tolist() == broken
    assert value.isnan().any(dim=1).tolist() == broken
    assert dlogits.isnan().any(dim=1).tolist() == broken
    assert dlogits[3, :150].abs().max() == 0


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_masked_rows_are_never_read(garbage: float) -> None:
    mask = torch.tensor([True, False, True, False], device=DEVICE)
    logits, codebook, embedding = randn(4, 50), randn(50, 5), randn(5)
    poisoned = torch.where(mask[:, None], garbage, logits)
    temperature = torch.where(mask, 3.0, 1.5)

    def run(z: Tensor, e: Tensor, t: Tensor, m: Tensor) -> Tensor:
        return call(z, e, temperature=t, mask=mask, mask_embedding=m)

    value, grads = gradients(run, (poisoned, codebook, temperature, embedding))
    clean, clean_grads = gradients(run, (logits, codebook, temperature, embedding))
    assert_same_bits(value, clean)
    assert_same_bits(value[mask], embedding.expand(2, 5))
    for mine, theirs in zip(grads, clean_grads, strict=True):
        assert_same_bits(mine, theirs)
    assert bool((grads[0][mask] == 0).all())
    assert bool((grads[2][mask] == 0).all())
    assert_same_bits(grads[3], torch.full((5,), 2.0, device=DEVICE))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (4, 1), (5,), (2, 0, 3, 5)])
def test_empty_and_tiny_shapes(shape: tuple[int, ...]) -> None:
    codebook = randn(shape[-1], 1)
    value, (dlogits, dcodebook) = gradients(call, (randn(*shape), codebook))
    assert value.shape == (*shape[:-1], 1)
    assert dlogits.shape == shape
    if value.numel() == 0:
        assert_same_bits(dcodebook, torch.zeros_like(codebook))
    if shape[-1] == 1:
        assert_same_bits(value, codebook.expand_as(value))
        assert bool((dlogits == 0).all())


@pytest.mark.parametrize("vocabulary", [48, 50])
def test_any_strides(vocabulary: int) -> None:
    base, codebook = randn(3, 2, 5, vocabulary), randn(vocabulary, 9)
    expected = call(base, codebook)
    views = [strided(base, form) for form in ("padded", "transposed", "columns")]
    views.append(base.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3))
    shifted = torch.cat([base.new_zeros(1), base.flatten()])[1:].view(base.shape)
    wide = torch.repeat_interleave(codebook, 2, dim=1)
    for view in (*views, shifted):
        assert_same_bits(call(view, codebook), expected)
    assert_same_bits(call(views[1], wide[:, ::2]), expected)
    alike = call(base[:1, :1].expand(3, 2, 5, vocabulary), codebook)
    assert_same_bits(alike, expected[:1, :1].expand(3, 2, 5, 9))
    upstream = torch.ones((), device=DEVICE).expand(3, 2, 5, 9)
    _, (dlogits, _) = gradients(call, (views[1], codebook), upstream)
    assert dlogits.is_contiguous()


def test_which_logits_are_copied() -> None:
    """Two strides between rows are walked; rows whose length allows for alignment have to be aligned."""
    base = torch.zeros(2, 3, 4, 32)
    copied = {
        "contiguous": layout.copy_reason(base),
        "two strides": layout.copy_reason(base[0].transpose(0, 1)),
        "three strides": layout.copy_reason(base.permute(1, 0, 2, 3)[:, :, ::2]),
        "along V": layout.copy_reason(base.transpose(2, 3)),
        "shifted": layout.copy_reason(torch.zeros(65)[1:].view(2, 32)),
        "padded": layout.copy_reason(torch.zeros(2, 33)[:, :32]),
        "odd rows": layout.copy_reason(torch.zeros(2, 33)[:, 1:32]),
    }
    assert {name for name, why in copied.items() if why} == {
        "three strides", "along V", "shifted", "padded"
    }  # fmt: skip
    assert copied["along V"] == "stride 32 along V"


@pytest.mark.parametrize("vocabulary", [16, 33])
def test_infinite_temperature_gives_the_mean(vocabulary: int) -> None:
    logits, codebook = randn(2, vocabulary), randn(vocabulary, 4)
    for temperature in (torch.full((2,), torch.inf, device=DEVICE), 1e39):
        value = call(logits, codebook, temperature=temperature)
        torch.testing.assert_close(value, codebook.mean(0).expand(2, 4))


# ---------------------------------------------------------------------------------------------------
# torch


@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
def test_opcheck(table: torch.dtype) -> None:
    case = make_case((2, 3), 6, 3, torch.float32, table, mask=True)
    seed = torch.tensor([1, 2], device=DEVICE)
    temperature = torch.rand(3, device=DEVICE) + 0.5
    for hard in (False, True):
        torch.library.opcheck(
            torch.ops.softdimo_triton.soft_embedding,
            (case.logits.requires_grad_(), case.codebook.requires_grad_(), 1.0,
             temperature.requires_grad_(), case.options["mask"], case.mask_embedding, seed, None, False,
             hard),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )  # fmt: skip


def test_gradients_only_where_required() -> None:
    case = make_case((5,), 9, 3, torch.float32, torch.float32, mask=True, temperature="rows")
    _, everything = gradients(case.call("triton"), case.tensors())
    for wanted in range(1, 16):
        leaves = [
            t.detach().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(case.tensors())
        ]
        case.call("triton")(*leaves).sum().backward()
        for i, (leaf, full) in enumerate(zip(leaves, everything, strict=True)):
            if wanted >> i & 1:
                assert_same_bits(leaf.grad, full)
            else:
                assert leaf.grad is None


def test_double_backward_is_that_of_the_specification() -> None:
    logits, codebook = randn(4, 6), randn(6, 3)

    def second(backend: str, z: Tensor, e: Tensor) -> tuple[Tensor, ...]:
        z, e = z.detach().requires_grad_(), e.detach().requires_grad_()
        value = soft_embedding(z, e, backend=backend).square().sum()
        (gradient,) = torch.autograd.grad(value, z, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (z, e))

    truth = second("reference", logits.double(), codebook.double())
    for mine, true in zip(second("triton", logits, codebook), truth, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-6)


def test_compiles_and_exports() -> None:
    def run(z: Tensor, e: Tensor, t: Tensor) -> Tensor:
        return call(z, e, temperature=t, noise="gumbel", seed=1)

    inputs = (randn(5, 20), randn(20, 3), torch.rand(5, device=DEVICE) + 0.5)
    assert_compiles_bitwise(run, *inputs)
    assert_exports(run, *inputs)


def test_which_kernel_runs() -> None:
    logits, codebook = randn(4, 10), randn(10, 12)
    assert operators_run(lambda: call(logits, codebook)) == ["softdimo_triton::soft_embedding"]
    found = explain(soft_embedding, logits, codebook.bfloat16(), backend="triton", precision="high")
    assert found.kernel == ("softdimo_triton::soft_embedding, products in bfloat16, p in two terms")
    narrow = explain(soft_embedding, logits.t(), randn(4, 3), backend="triton")
    assert narrow.kernel.endswith("products in float32, sums in float64")
    assert narrow.notes == ("logits have stride 10 along V: one contiguous copy is made",)


def test_vmap_is_refused() -> None:
    codebook = randn(6, 2)
    with pytest.raises(RuntimeError, match=r"does not support torch\.vmap"):
        torch.vmap(lambda z: call(z, codebook))(randn(3, 4, 6))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("do not truncate", {"top_k": 3}),
        ("do not truncate", {"top_p": 0.5}),
        ("at most 128 columns, this one has 129", {"codebook": torch.zeros(6, 129)}),
        ("an input is float64", {"codebook": torch.zeros(6, 2, dtype=torch.double)}),
        ("an input is float64", {"temperature": torch.ones(4, dtype=torch.double)}),
    ],
)
def test_what_the_kernels_do_not_take(message: str, options: dict[str, Any]) -> None:
    moved = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
    codebook = moved.pop("codebook", randn(6, 2))
    with pytest.raises(ValueError, match=rf"backend='triton' cannot run: .*{message}"):
        call(randn(4, 6), codebook, **moved)
