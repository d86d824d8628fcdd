"""The layers of Meissonic outside its blocks, under the published parameter names."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from softdimo_fast.models.joint_blocks import RmsNorm

SINUSOID = 256  # width of each sinusoid


def pointwise(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """A 1x1 convolution of channels that come last."""
    return F.linear(x, convolution.weight.flatten(1))


class TokenEmbedding(nn.Module):
    """A table, RMSNorm and a 1x1 convolution. A call gives rows of the table; :meth:`enter` does the rest."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(rows, width)
        self.layer_norm = RmsNorm(width)
        self.conv = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        rows: Tensor = self.embeddings(tokens)
        return rows

    def enter(self, rows: Tensor) -> Tensor:
        """``[..., D]`` to the same."""
        return pointwise(self.layer_norm(rows), self.conv)


class Head(nn.Module):
    def __init__(self, width: int, codes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 1, bias=False)
        self.layer_norm = RmsNorm(width)
        self.conv2 = nn.Conv2d(width, codes, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """What precedes the last matrix."""
        normed: Tensor = self.layer_norm(pointwise(hidden, self.conv1))
        return normed


class Resample(nn.Module):
    """RMSNorm, then a 2x2 convolution that halves or doubles the grid ``[B, h, w, D]``."""

    def __init__(self, width: int, kind: type[nn.Conv2d] | type[nn.ConvTranspose2d]) -> None:
        super().__init__()
        self.norm = RmsNorm(width)
        self.conv = kind(width, width, 2, 2, bias=False)

    def forward(self, grid: Tensor) -> Tensor:
        rows: Tensor = self.conv(self.norm(grid).permute(0, 3, 1, 2))
        return rows.permute(0, 2, 3, 1)


class TwoLayers(nn.Module):
    def __init__(self, inputs: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width, bias=bias)
        self.linear_2 = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return mixed


class TimeText(nn.Module):
    """The conditioning vector of timestep and pooled text."""

    def __init__(self, width: int, pooled: int) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayers(SINUSOID, width, bias=True)
        self.text_embedder = TwoLayers(pooled, width, bias=True)

    def forward(self, waves: Tensor, pooled: Tensor) -> Tensor:
        vector: Tensor = self.timestep_embedder(waves) + self.text_embedder(pooled)
        return vector
