"""What MaskGen and Meissonic share: blocks in which text and image rows attend to each other.

Sources: the joint (double-stream) blocks of Stable Diffusion 3 (arXiv 2403.03206) and the single-stream
blocks that follow them in FLUX and Meissonic (arXiv 2410.08261); adaLN-zero of DiT (arXiv 2212.09748);
rotary positions (arXiv 2104.09864). Parameter names are those of the published checkpoints.

Attention runs through ``scaled_dot_product_attention``, text rows first; there is no dropout anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

EPS = 1e-6


class Rotation(NamedTuple):
    """Cosine and sine ``[rows, head width]`` of each row's rotary angles, equal within a pair of channels."""

    cosine: Tensor
    sine: Tensor


def require_shape(owner: object, name: str, tensor: Tensor, *expected: int | None) -> None:
    """Raises ValueError unless ``tensor`` has the expected shape; None stands for any size."""
    shape = tensor.shape
    if len(shape) != len(expected) or any(
        e not in (None, s) for s, e in zip(shape, expected, strict=True)
    ):
        words = ", ".join("*" if size is None else str(size) for size in expected)
        raise ValueError(
            f"{type(owner).__name__}: {name} must have shape [{words}], got {list(shape)}"
        )


# max_period -> i / (width / 2) where torch's float32 exp, with MKL on its path for every processor
# (MKL_CBWR=COMPATIBLE), gives the float32 above the nearest one; a test holds the table against it. Its
# faster paths and other libraries differ in a few more. So the frequencies are the same on every device.
_ROUNDED_UP = {10000.0: (12 / 128, 106 / 128), 1000.0: (16 / 128, 77 / 128)}


def sinusoid(values: Tensor, width: int, *, max_period: float, sine_first: bool) -> Tensor:
    """float32 ``[..., width]``: sines and cosines of ``values`` times frequencies from 1 to 1 / max_period.

    Frequencies and arguments are float32, as in the published models: frequency i is exp(-ln(max_period) i /
    (width / 2)), whose exponent is rounded to float32 first. Meissonic's arguments reach 1e6, where the last
    bit of a frequency changes the result by up to 0.06.
    """
    index = torch.arange(width // 2, dtype=torch.float32, device=values.device)
    exponent = -math.log(max_period) * index / (width // 2)
    exact = exponent.double().exp()
    for fraction in _ROUNDED_UP.get(max_period, ()):
        exact = torch.where(index / (width // 2) == fraction, exact * (1 + 2**-25), exact)
    angles = values.float()[..., None] * exact.float()
    waves = (angles.sin(), angles.cos()) if sine_first else (angles.cos(), angles.sin())
    return torch.cat(waves, dim=-1)


def rotation(
    positions: Tensor, axes: Sequence[int], *, theta: float, dtype: torch.dtype
) -> Rotation:
    """The rotary angles of rows at ``positions`` ``[rows, len(axes)]``; channels are split over the axes.

    Angles are computed in float64, and returned in ``dtype``.
    """
    angles = []
    for axis, channels in enumerate(axes):
        index = torch.arange(0, channels, 2, dtype=torch.float64, device=positions.device)
        frequencies = 1.0 / theta ** (index / channels)
        angles.append(positions[:, axis, None].double() * frequencies)
    every = torch.cat(angles, dim=-1).repeat_interleave(2, dim=-1)
    return Rotation(every.cos().to(dtype), every.sin().to(dtype))


def _rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns each pair of adjacent channels (2k, 2k + 1) by its angle."""
    wide = x.to(rotation.cosine.dtype)
    first, second = wide.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return (wide * rotation.cosine + turned * rotation.sine).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters, then (1 + scale) and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


class RmsNorm(nn.RMSNorm):
    """RMSNorm with a weight, computed in the weight's dtype: float32 under autocast."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return super().forward(x.to(self.weight.dtype))


class Modulation(nn.Module):
    """``count`` vectors ``[B, 1, D]`` from SiLU of the conditioning vector ``[B, D]``."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(width, count * width)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(vector))[:, None].chunk(self.count, dim=-1)  # type: ignore[no-any-return]


class ContinuousNorm(nn.Module):
    """The adaptive norm at the end of a stream. Its linear layer gives scale first, then shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(vector))[:, None].chunk(2, dim=-1)
        return modulate(x, shift, scale)


class _Gelu(nn.Module):
    """A linear layer and the tanh form of GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """D -> 4 D -> D."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Identity where the published model has a dropout slot, which counts in the parameter names.
        self.net = nn.Sequential(
            _Gelu(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.net(x)
        return mixed


def attend(query: Tensor, key: Tensor, value: Tensor, rotation: Rotation | None) -> Tensor:
    """``[B, T, D]`` of queries, keys and values ``[B, heads, T, head width]``."""
    if rotation is not None:
        query, key = _rotate(query, rotation), _rotate(key, rotation)
    attended = F.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value)
    rows: Tensor = attended.transpose(1, 2).flatten(2)
    return rows


class JointAttention(nn.Module):
    """Attention over text and image rows together, with projections of their own.

    Args:
        normalized: RMSNorm of every head's queries and keys.
        writes_text: False in a last block that drops the text; its text queries stay, unused, because the
            published files hold them.
    """

    def __init__(self, width: int, heads: int, *, normalized: bool, writes_text: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.add_k_proj, self.add_v_proj, self.add_q_proj = (
            nn.Linear(width, width) for _ in range(3)
        )
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_add_out = nn.Linear(width, width) if writes_text else None
        head = width // heads
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = (
            RmsNorm(head) if normalized else None for _ in range(4)
        )

    def _heads(self, x: Tensor, norm: RmsNorm | None) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if norm is not None:
            heads = norm(heads)
        return heads

    def forward(
        self, text: Tensor, image: Tensor, rotation: Rotation | None
    ) -> tuple[Tensor | None, Tensor]:
        """Rows ``[B, T, D]`` and ``[B, L, D]`` to the same; None for text that is not written."""
        # A dropped text stream still asks its queries: every parameter takes part in backward, which
        # distributed training expects.
        query = self._heads(self.add_q_proj(text), self.norm_added_q)
        key = self._heads(self.add_k_proj(text), self.norm_added_k)
        value = self._heads(self.add_v_proj(text), None)
        query = torch.cat([query, self._heads(self.to_q(image), self.norm_q)], dim=2)
        key = torch.cat([key, self._heads(self.to_k(image), self.norm_k)], dim=2)
        value = torch.cat([value, self._heads(self.to_v(image), None)], dim=2)
        rows = attend(query, key, value, rotation)
        written, seen = rows.split([text.shape[1], image.shape[1]], dim=1)
        return None if self.to_add_out is None else self.to_add_out(written), self.to_out[0](seen)


class JointBlock(nn.Module):
    """Text and image streams: joint attention, then an MLP each, gated by the conditioning vector.

    Args:
        last: the text stream ends here: it has only a norm, and its output is None.
    """

    def __init__(self, width: int, heads: int, *, normalized: bool, last: bool = False) -> None:
        super().__init__()
        self.norm1 = Modulation(width, 6)
        self.norm1_context: Modulation | ContinuousNorm = (
            ContinuousNorm(width) if last else Modulation(width, 6)
        )
        self.attn = JointAttention(width, heads, normalized=normalized, writes_text=not last)
        self.ff = FeedForward(width)
        self.ff_context = None if last else FeedForward(width)

    def forward(
        self, text: Tensor, image: Tensor, vector: Tensor, rotation: Rotation | None
    ) -> tuple[Tensor | None, Tensor]:
        shift, scale, gate, *mlp = self.norm1(vector)
        image_in = modulate(image, shift, scale)
        if isinstance(self.norm1_context, ContinuousNorm):
            _, attended = self.attn(self.norm1_context(text, vector), image_in, rotation)
            return None, _gated(image, attended, gate, self.ff, *mlp)
        shift, scale, text_gate, *text_mlp = self.norm1_context(vector)
        written, attended = self.attn(modulate(text, shift, scale), image_in, rotation)
        assert self.ff_context is not None
        text = _gated(text, written, text_gate, self.ff_context, *text_mlp)
        return text, _gated(image, attended, gate, self.ff, *mlp)


def _gated(
    x: Tensor, attended: Tensor, gate: Tensor, mlp: FeedForward, shift: Tensor, scale: Tensor,
    mlp_gate: Tensor,
) -> Tensor:  # fmt: skip
    """A stream after its attention and its MLP, each scaled by a gate and added."""
    x = x + gate * attended
    mixed: Tensor = x + mlp_gate * mlp(modulate(x, shift, scale))
    return mixed


class SingleAttention(nn.Module):
    """Attention within one sequence; without an output projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_k = (RmsNorm(width // heads) for _ in range(2))
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        return attend(self.norm_q(query), self.norm_k(key), value, rotation)


class SingleBlock(nn.Module):
    """Text and image rows as one sequence: attention and MLP side by side, one projection for both."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = Modulation(width, 3)
        self.proj_mlp = nn.Linear(width, 4 * width)
        self.proj_out = nn.Linear(5 * width, width)
        self.attn = SingleAttention(width, heads)

    def forward(self, x: Tensor, vector: Tensor, rotation: Rotation | None) -> Tensor:
        shift, scale, gate = self.norm(vector)
        rows = modulate(x, shift, scale)
        attended = self.attn(rows, rotation)
        mixed = F.gelu(self.proj_mlp(rows), approximate="tanh")
        added: Tensor = x + gate * self.proj_out(torch.cat([attended, mixed], dim=-1))
        return added


def run_block(block: nn.Module, checkpointed: bool, *inputs: Any) -> Any:
    """``block(*inputs)``; ``checkpointed`` keeps only the inputs for backward."""
    if checkpointed and torch.is_grad_enabled():
        # The blocks draw nothing: there is no random state to restore.
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)
