"""What the MaskGIT and MaskBit transformers share: blocks over the visual rows and, last, a class row.

Their attention keeps the parameter names of ``nn.MultiheadAttention``, under which the published
checkpoints store it, and runs through ``scaled_dot_product_attention``: no attention map is ever in memory.
There is no dropout anywhere: student, teacher and auxiliary draw nothing, in train mode as in eval mode.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from softdimo_fast.models.protocol import MaskedDiffusionModel


class SelfAttention(nn.Module):
    """Multi-head self-attention ``[B, T, D] -> [B, T, D]``, every row to every row."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return projected


class BlockStack(nn.Module):
    """The blocks one after the other; ``checkpointed`` keeps only their inputs for backward."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.checkpointed = False

    def forward(self, x: Tensor, wanted: tuple[int, ...] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """The last output, and those of the ``wanted`` blocks.

        If any are wanted, the blocks after the last of them are not run.
        """
        outputs: dict[int, Tensor] = {}
        for i, block in enumerate(self.layers):
            if self.checkpointed and torch.is_grad_enabled():
                # The blocks draw nothing: there is no random state to restore.
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
            if i in wanted:
                outputs[i] = x
                if i == max(wanted):
                    break
        return x, outputs


class ClassTokenTransformer(MaskedDiffusionModel):
    """N visual rows and a class row, which comes last; conditions are int64 labels from 0.

    Subclasses set ``transformer`` and ``classes`` (the null class is number ``classes``, the one after
    the last real label).
    """

    transformer: BlockStack
    classes: int

    @abstractmethod
    def first_rows(self, embeddings: Tensor, condition: Tensor) -> Tensor:
        """The input ``[B, N + 1, H]`` of the first block: visual rows, then the class row."""

    @property
    def checkpoint_blocks(self) -> bool:
        """Recompute each block in backward instead of keeping what is inside it."""
        return self.transformer.checkpointed

    @checkpoint_blocks.setter
    def checkpoint_blocks(self, value: bool) -> None:
        self.transformer.checkpointed = value

    @property
    def depth(self) -> int:
        return len(self.transformer.layers)

    def unconditional(self, condition: Tensor) -> Tensor:
        return torch.full_like(condition, self.classes)

    def forward(self, embeddings: Tensor, condition: Tensor) -> Tensor:
        rows, _ = self.transformer(self.first_rows(embeddings, condition))
        hidden: Tensor = rows[:, :-1]
        return hidden

    def features(
        self, embeddings: Tensor, condition: Tensor, layers: tuple[int, ...]
    ) -> list[Tensor]:
        """The outputs ``[B, N + 1, H]`` of the named blocks, the class row last.

        Raises:
            ValueError: there is no such block.
        """
        if any(not 0 <= layer < self.depth for layer in layers):
            raise ValueError(
                f"features: layers must be numbers from 0 to {self.depth - 1}, got {layers}"
            )
        if not layers:
            return []
        _, outputs = self.transformer(self.first_rows(embeddings, condition), tuple(layers))
        return [outputs[layer] for layer in layers]

    def check_rows(self, embeddings: Tensor, condition: Tensor, width: int) -> None:
        """Raises ValueError unless the shapes fit each other and the model."""
        rows = self.token_shape[0]
        if embeddings.dim() != 3 or embeddings.shape[1:] != (rows, width):
            raise ValueError(
                f"{type(self).__name__}: embeddings must have shape [B, {rows}, {width}], got "
                f"{list(embeddings.shape)}"
            )
        if condition.shape != embeddings.shape[:1]:
            raise ValueError(
                f"{type(self).__name__}: condition must be labels of shape "
                f"[{embeddings.shape[0]}], got {list(condition.shape)}"
            )


def initialize(module: nn.Module) -> None:
    """Matrices and tables from N(0, 0.02^2) cut at two deviations, biases 0, norms the identity.

    For training from nothing; a checkpoint replaces all of it.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(part.weight, std=0.02, a=-0.04, b=0.04)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)
        if isinstance(part, SelfAttention):
            nn.init.trunc_normal_(part.in_proj_weight, std=0.02, a=-0.04, b=0.04)
