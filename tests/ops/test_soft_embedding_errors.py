"""soft_embedding refuses bad input with an error that names the argument."""
# ruff: noqa: E501 - a table reads better with one case a line

from __future__ import annotations

from typing import Any

import pytest
import torch

from softdimo_fast import soft_embedding

Z, E, M = torch.randn(4, 6, 10), torch.randn(10, 3), torch.zeros(4, 6, dtype=torch.bool)
GROUPED = torch.randn(6, 10, 3)

BAD: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (TypeError, "logits must be a torch.Tensor, got list", ([1.0], E), {}),
    (TypeError, "logits must have dtype .* got torch.int64", (torch.ones(2, 10, dtype=torch.int64), E), {}),
    (TypeError, "logits must be a dense", (torch.eye(10).to_sparse(), E), {}),
    (TypeError, "codebook must be a torch.Tensor, got NoneType", (Z, None), {}),
    (TypeError, "codebook must have dtype .* got torch.complex64", (Z, E.to(torch.complex64)), {}),
    (ValueError, r"logits must have shape \[\.\.\., V\], got 0-d", (torch.tensor(1.0), E), {}),
    (ValueError, "logits must have a vocabulary V >= 1", (torch.ones(3, 0), torch.ones(0, 3)), {}),
    (ValueError, r"codebook must have shape \[V, D\] or \[G, V, D\], got \[10\]", (Z, E[:, 0]), {}),
    (ValueError, r"codebook must have V = 10 rows", (Z, torch.ones(9, 3)), {}),
    (ValueError, "codebook must have a width D >= 1", (Z, torch.ones(10, 0)), {}),
    (ValueError, "codebook must have .* at least one group", (Z[:, :0], torch.ones(0, 10, 3)), {}),
    (ValueError, r"grouped codebook .* needs logits \[\.\.\., G, V\] with G = 5", (Z, GROUPED[:5]), {}),
    (ValueError, "codebook is on meta, but logits is on cpu", (Z, E.to("meta")), {}),
    (ValueError, "temperature must be positive and finite, got 0", (Z, E), {"temperature": 0}),
    (ValueError, "temperature must be positive and finite, got -1.0", (Z, E), {"temperature": -1.0}),
    (ValueError, "temperature must be finite, got nan", (Z, E), {"temperature": float("nan")}),
    (ValueError, "temperature must be finite, got inf", (Z, E), {"temperature": float("inf")}),
    (TypeError, "temperature must be a float, got str", (Z, E), {"temperature": "1"}),
    (TypeError, "temperature must be a float, got bool", (Z, E), {"temperature": True}),
    (TypeError, "temperature must have dtype", (Z, E), {"temperature": torch.ones(6, dtype=torch.int32)}),
    (ValueError, r"temperature must broadcast to the rows .* = \[4, 6\], got shape \[5\]", (Z, E), {"temperature": torch.ones(5)}),
    (ValueError, "temperature must be positive everywhere, its smallest value is -1.0", (Z, E), {"temperature": torch.tensor([1.0, -1, 1, 1, 1, 1])}),
    (ValueError, "mask_embedding is required when mask is given", (Z, E), {"mask": M}),
    (ValueError, "mask_embedding is given, but mask is None", (Z, E), {"mask_embedding": E[0]}),
    (TypeError, "mask must have dtype bool, got torch.uint8", (Z, E), {"mask": M.byte(), "mask_embedding": E[0]}),
    (TypeError, "mask must be a bool tensor or None, got list", (Z, E), {"mask": [True], "mask_embedding": E[0]}),
    (ValueError, r"mask must broadcast to the rows .* got shape \[4\]", (Z, E), {"mask": M[:, 0], "mask_embedding": E[0]}),
    (ValueError, r"mask_embedding must have shape \[D\] = \[3\], got \[4\]", (Z, E), {"mask": M, "mask_embedding": torch.ones(4)}),
    (ValueError, r"mask_embedding must have shape \[G, D\] = \[6, 3\], got \[3\]", (Z, GROUPED), {"mask": M, "mask_embedding": E[0]}),
    (ValueError, "noise must be None or 'gumbel', got 'normal'", (Z, E), {"noise": "normal"}),
    (ValueError, "seed is given, but noise is None", (Z, E), {"seed": 1}),
    (ValueError, "row_ids is given, but noise is None", (Z, E), {"row_ids": torch.arange(6)}),
    (ValueError, "generator is given, but noise is None", (Z, E), {"generator": torch.Generator()}),
    (ValueError, "seed and generator exclude each other", (Z, E), {"noise": "gumbel", "seed": 1, "generator": torch.Generator()}),
    (TypeError, "seed must be an int, .* got float", (Z, E), {"noise": "gumbel", "seed": 1.0}),
    (ValueError, "seed must fit in 64 signed bits", (Z, E), {"noise": "gumbel", "seed": 2**63}),
    (ValueError, r"seed tensor must be int64 of shape \[2\]", (Z, E), {"noise": "gumbel", "seed": torch.ones(3, dtype=torch.int64)}),
    (TypeError, "row_ids must be an int64 tensor or None, got torch.int32", (Z, E), {"noise": "gumbel", "row_ids": torch.arange(6, dtype=torch.int32)}),
    (ValueError, "row_ids must broadcast to the rows", (Z, E), {"noise": "gumbel", "row_ids": torch.arange(5)}),
    (TypeError, "top_k must be an int or None, got float", (Z, E), {"top_k": 2.0}),
    (ValueError, "top_k must be at least 1, got 0", (Z, E), {"top_k": 0}),
    (ValueError, r"top_p must be in \(0, 1\], got 0", (Z, E), {"top_p": 0}),
    (ValueError, r"top_p must be in \(0, 1\], got 1.5", (Z, E), {"top_p": 1.5}),
    (TypeError, "top_p must be a float, got str", (Z, E), {"top_p": "all"}),
    (ValueError, "precision must be one of 'default', 'high', got 'low'", (Z, E), {"precision": "low"}),
    (ValueError, "backend must be None or one of .* got 'numpy'", (Z, E), {"backend": "numpy"}),
    (ValueError, "backend='cuda' cannot run: the CUDA kernels need CUDA tensors, these are on cpu", (Z, E), {"backend": "cuda"}),
    (ValueError, "backend='triton' cannot run: .* top_k or top_p", (Z, E), {"backend": "triton", "top_k": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "arguments", "options"), BAD)
def test_bad_input_names_the_argument(
    error: type[Exception], message: str, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=f"soft_embedding: .*{message}|soft_embedding: {message}"):
        soft_embedding(*arguments, **options)


def test_the_operator_itself_refuses_what_would_be_unsafe() -> None:
    """Below the public function, where a C++ caller would arrive: no read outside a tensor."""
    forward, backward = (
        torch.ops.softdimo.soft_embedding,
        torch.ops.softdimo.soft_embedding_backward,
    )
    logits, none = Z[0], (None,) * 4
    rest = (None, None, False)
    with pytest.raises(RuntimeError):
        forward(logits, E, 1.0, torch.ones(2), *none, *rest, False)
    with pytest.raises(RuntimeError, match="seed must be int64"):
        forward(logits, E, 1.0, None, None, None, torch.zeros(1), None, *rest, False)
    with pytest.raises(RuntimeError, match="codebook does not fit"):
        forward(logits, E[:9], 1.0, None, *none, *rest, False)
    with pytest.raises(RuntimeError, match="mask does not fit"):
        forward(logits, E, 1.0, None, M[0, :5], E[0], None, None, *rest, False)
    value, top, total, _, threshold, last = forward(
        logits, E, 1.0, None, *none, 3, None, False, False
    )
    for bad in (
        (top, total.half(), value, threshold, last),
        (top[:5], total, value, threshold, last),
        (top, total, value[:5], threshold, last),
        (top, total, value, threshold[:5], last),
        (top, total, value, threshold, last.int()),
    ):
        with pytest.raises(RuntimeError, match="saved tensors do not fit"):
            backward(value, logits, E, 1.0, None, *none, 3, None, False, *bad, [True] * 4)
