"""What a masked-diffusion transformer and a tokenizer are to the rest of the package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softdimo_fast.models.conditions import Condition
from softdimo_fast.ops import soft_embedding


class MaskedDiffusionModel(nn.Module, ABC):
    """A transformer that predicts the tokens at the [MASK] positions of a token grid.

    Tokens are int64 ``[B, *token_shape]``: ``(L,)``, or ``(L, G)`` where a position holds G tokens of one
    vocabulary each (MaskBit's splits). Logits are ``[B, *token_shape, V]``.

    Attributes:
        vocabulary: V, the codes that can be predicted; [MASK] is not one of them.
        mask_id: the token of a [MASK] position.
        token_shape: of one sample.
    """

    vocabulary: int
    mask_id: int
    token_shape: tuple[int, ...]

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """The input embeddings ``[B, L, D]`` of tokens, codes and [MASK]; without positions."""

    @property
    @abstractmethod
    def token_table(self) -> Tensor:
        """The matrix of the soft embeddings: ``[V, D]``, or ``[G, V, D / G]`` for grouped tokens."""

    @property
    @abstractmethod
    def mask_embedding(self) -> Tensor:
        """What a [MASK] position contributes: ``[D]``, or ``[G, D / G]``."""

    @abstractmethod
    def embedding_parameters(self) -> list[nn.Parameter]:
        """The parameters of the input embedding, which distillation keeps frozen."""

    @abstractmethod
    def unconditional(self, condition: Condition) -> Condition:
        """The condition of the unconditional branch of guidance, shaped as ``condition``."""

    @abstractmethod
    def forward(self, embeddings: Tensor, condition: Condition) -> Tensor:
        """Hidden states ``[B, L, H]`` of the token positions."""

    @abstractmethod
    def features(
        self, embeddings: Tensor, condition: Condition, layers: tuple[int, ...]
    ) -> list[Tensor]:
        """The outputs ``[B, T, H]`` of the named layers, for discriminator heads; T counts every position."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """The number of layers that :meth:`features` can name."""

    @abstractmethod
    def head_input(self, hidden: Tensor) -> Tensor:
        """What the head multiplies: ``logits = head_input(hidden) @ head_weight.T + head_bias``.

        Every position for itself, whatever the leading shape ``[..., H]``.
        """

    @property
    @abstractmethod
    def head_weight(self) -> Tensor:
        """``[V, H]``, or ``[G, V, H]`` for grouped tokens."""

    @property
    @abstractmethod
    def head_bias(self) -> Tensor | None:
        """``[V]`` or ``[G, V]``, with a first dimension L where each position has its own; or None."""

    def head(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits ``[B, *token_shape, V]`` of hidden states ``[B, L, H]``, or of wanted rows alone.

        Args:
            rows: int64 ``[R]``, positions counted through the batch: position l of sample b has number
                b x L + l. The logits are then ``[R, V]``, or ``[R, G, V]`` for grouped tokens (a position's
                groups go together), and neither :meth:`head_input` nor the matrix is computed elsewhere.
        """
        return self.head_columns(hidden, self.head_weight, self.head_bias, rows)

    def head_columns(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None
    ) -> Tensor:
        """:meth:`head` with another ``head_weight`` and ``head_bias``: fewer columns, or more."""
        if rows is not None:
            hidden = hidden.flatten(0, -2).index_select(0, rows)
            if bias is not None and bias.dim() == weight.dim():  # a bias for each position
                bias = F.embedding(rows % len(bias), bias.flatten(1)).view(-1, *bias.shape[1:])
        logits = F.linear(self.head_input(hidden), weight.flatten(0, -2))
        if weight.dim() == 3:
            logits = logits.unflatten(-1, weight.shape[:2])
        return logits if bias is None else logits + bias

    def logits(
        self, embeddings: Tensor, condition: Condition, rows: Tensor | None = None
    ) -> Tensor:
        """Embeddings to logits in one call; ``rows`` as for :meth:`head`."""
        return self.head(self(embeddings, condition), rows)

    def soft_embed(self, logits: Tensor, *, mask: Tensor | None = None, **options: Any) -> Tensor:
        """The expected input embedding ``[B, L, D]`` under softmax(logits); True in ``mask`` is [MASK].

        ``options`` go to :func:`softdimo_fast.soft_embedding`. One-hot logits give what :meth:`embed`
        gives (Soft-Di[M]O, arXiv 2509.22925).
        """
        if mask is not None:
            options |= {"mask": mask, "mask_embedding": self.mask_embedding}
        table = self.token_table
        soft = soft_embedding(logits, table, **options)
        return soft.flatten(-2) if table.dim() == 3 else soft

    def masked_tokens(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """``tokens`` with [MASK] where ``mask`` is True."""
        return torch.where(mask, self.mask_id, tokens)

    def masked_condition(self, condition: Condition, mask: Tensor) -> Condition:
        """``condition`` with what the model is told of the mask, bool ``[B, *token_shape]``: a timestep.

        Most families are told nothing; Meissonic is, where its config says so.
        """
        return condition

    def timed_condition(self, condition: Condition, time: float) -> Condition:
        """``condition`` at a timestep that a sampler sets; families without timesteps are told nothing."""
        return condition

    def generator_input(self, embeddings: Tensor) -> Tensor:
        """``[B, L, D]``: where a one-step generator adds its noise and test-time search moves.

        The embeddings themselves, unless layers without attention follow them (Meissonic's norm and
        convolution, after which the public Di[M]O code adds the noise).
        """
        return embeddings

    def generator_logits(self, inputs: Tensor, condition: Condition) -> Tensor:
        """Logits of what :meth:`generator_input` gave, perturbed or moved."""
        return self.logits(inputs, condition)


class Tokenizer(nn.Module, ABC):
    """Images to tokens and back.

    Decoding takes the samples' condition, which tokenizers without text do not look at.

    Attributes:
        token_shape: of one image.
    """

    token_shape: tuple[int, ...]

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """int64 tokens ``[B, *token_shape]`` of images ``[B, C, height, width]``."""

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """``[V, D]``, or ``[G, V, D / G]``: what soft embeddings for :meth:`decode_codes` multiply."""

    @abstractmethod
    def decode_codes(self, codes: Tensor, condition: Condition = None) -> Tensor:
        """Images in [-1, 1] of code vectors ``[B, L, D]``, hard or expected; differentiable.

        Args:
            condition: of the samples; TA-TiTok's decoder reads its text and does not work without.
        """

    @abstractmethod
    def decode(self, tokens: Tensor, condition: Condition = None) -> Tensor:
        """Images in [-1, 1] of tokens."""

    def decode_soft(self, logits: Tensor, condition: Condition = None, **options: Any) -> Tensor:
        """Images of the expected code vectors under softmax(logits), differentiable.

        Columns of the logits beyond the codebook (a [MASK] column) are left out.
        """
        codebook = self.codebook
        soft = soft_embedding(logits[..., : codebook.shape[-2]], codebook, **options)
        codes = soft.flatten(-2) if codebook.dim() == 3 else soft
        return self.decode_codes(codes, condition=condition)
