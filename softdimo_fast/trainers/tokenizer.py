"""Training a tokenizer: a VQ autoencoder whose codebook is an exponential average of its encoder's vectors.

Source: van den Oord et al. (NeurIPS 2017), appendix A.1; unused codes are put back onto encoder vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from softdimo_fast import _config
from softdimo_fast.diffusion import Draws
from softdimo_fast.models.vector_quantizer import VectorQuantizer
from softdimo_fast.trainers.method import Loss, Method, Metrics, MicroBatch, Phase
from softdimo_fast.trainers.optimization import OptimizerConfig

# Images and conditions of a micro-batch's samples.
Images = Callable[[Draws], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Options of :class:`TokenizerMethod`.

    Attributes:
        commitment_weight: beta of the commitment loss.
        codebook_decay: of the codebook's exponential averages.
        start_step: before it the autoencoder trains without quantisation; there the codebook becomes
            encoder vectors.
        revive_every, revive_until: every so many steps, up to this step, a code used less than
            ``revive_below`` times the mean is put onto an encoder vector.
    """

    commitment_weight: float = 0.25
    codebook_decay: float = 0.99
    start_step: int = 50
    revive_every: int = 50
    revive_until: int = 1000
    revive_below: float = 0.03
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require_range(self, "commitment_weight", self.commitment_weight, minimum=0)
        _config.require_range(self, "codebook_decay", self.codebook_decay, minimum=0, maximum=1)
        _config.require_range(self, "start_step", self.start_step, minimum=0)
        _config.require_range(self, "revive_every", self.revive_every, minimum=1)
        _config.require_range(self, "revive_below", self.revive_below, minimum=0)


class TokenizerMethod(Method):
    """Role ``tokenizer``."""

    def __init__(self, tokenizer: VectorQuantizer, images: Images, config: TokenizerConfig) -> None:
        self.tokenizer, self.images, self.config = tokenizer, images, config

    @property
    def roles(self) -> Mapping[str, VectorQuantizer]:
        return {"tokenizer": self.tokenizer}

    @property
    def optimizers(self) -> Mapping[str, OptimizerConfig]:
        return {"tokenizer": self.config.optimizer}

    @property
    def averaged_roles(self) -> Sequence[str]:
        return ()  # averaged weights would not fit the codebook, which follows the newest encoder

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("tokenizer"),)

    def loss(self, phase: Phase, batch: MicroBatch) -> Loss:
        images, _ = self.images(batch.draws)
        vectors = self.tokenizer.encode_vectors(images)
        quantising = batch.draws.step >= self.config.start_step
        batch.memory["vectors"] = vectors.detach()
        if not quantising:
            reconstruction = F.mse_loss(self.tokenizer.decode_codes(vectors), images)
            return self._shared(batch, reconstruction, {"reconstruction": reconstruction})
        chosen = self.tokenizer.nearest(vectors.detach())
        codes = self.tokenizer.codebook[chosen]
        straight_through = vectors + (codes - vectors).detach()
        reconstruction = F.mse_loss(self.tokenizer.decode_codes(straight_through), images)
        commitment = F.mse_loss(vectors, codes)
        return self._shared(
            batch,
            reconstruction + self.config.commitment_weight * commitment,
            {"reconstruction": reconstruction, "commitment": commitment},
        )

    @staticmethod
    def _shared(batch: MicroBatch, loss: Tensor, metrics: Metrics) -> Loss:
        share = batch.share
        return Loss(loss * share, {name: m.detach() * share for name, m in metrics.items()})

    @torch.no_grad()
    def finish_step(self, step: int, batches: Sequence[MicroBatch]) -> Metrics:
        if step < self.config.start_step - 1:
            return {}
        vectors = torch.cat([batch.memory["vectors"].flatten(0, 1) for batch in batches])
        # No NaN may enter the codebook: the trainer's policy holds for gradient steps alone.
        finite = vectors.isfinite().all()
        vectors = vectors.to(self.tokenizer.codes.dtype).where(finite, 0)
        draws = batches[0].global_draws
        if step == self.config.start_step - 1 or step == self.config.start_step == 0:
            self._start_codebook(vectors, finite, draws)
        if step >= self.config.start_step:
            self._follow(vectors, finite)
            if step % self.config.revive_every == 0 and step < self.config.revive_until:
                self._revive(vectors, finite, draws)
        usage = self.tokenizer.usage / self.tokenizer.usage.sum()
        return {"codebook/perplexity": torch.special.entr(usage).sum().exp()}

    def _picked(self, vectors: Tensor, draws: Draws, stream: str) -> Tensor:
        """As many vectors as there are codes, chosen at random without repetition where that is possible."""
        count = self.tokenizer.config.vocabulary
        order = draws.part(0, 1).uniform(stream, len(vectors))[0].argsort()
        return vectors[order.repeat(-(-count // len(order)))[:count]]

    def _start_codebook(self, vectors: Tensor, finite: Tensor, draws: Draws) -> None:
        tokenizer = self.tokenizer
        fresh = self._picked(vectors, draws, "tokenizer/start")
        tokenizer.codes.copy_(torch.where(finite, fresh, tokenizer.codes))
        tokenizer.totals.copy_(tokenizer.codes)
        tokenizer.usage.fill_(1.0)

    def _follow(self, vectors: Tensor, finite: Tensor) -> None:
        """usage and totals: exponential averages of each code's count and vector sum; codes: their ratio."""
        tokenizer = self.tokenizer
        rate = (1 - self.config.codebook_decay) * finite
        numbers = torch.arange(tokenizer.config.vocabulary, device=vectors.device)
        one_hot = (tokenizer.nearest(vectors)[:, None] == numbers).to(vectors.dtype)
        tokenizer.usage.lerp_(one_hot.sum(0), rate)
        tokenizer.totals.lerp_(one_hot.T @ vectors, rate)
        tokenizer.codes.copy_(tokenizer.totals / (tokenizer.usage[:, None] + 1e-5))

    def _revive(self, vectors: Tensor, finite: Tensor, draws: Draws) -> None:
        tokenizer = self.tokenizer
        mean = tokenizer.usage.mean()
        dead = (tokenizer.usage < self.config.revive_below * mean) & finite
        fresh = self._picked(vectors, draws, "tokenizer/revive")
        # Enough usage to survive until the next look, and totals that agree with it.
        usage = torch.where(dead, 0.3 * mean, tokenizer.usage)
        tokenizer.usage.copy_(usage)
        column = dead[:, None]
        tokenizer.codes.copy_(torch.where(column, fresh, tokenizer.codes))
        tokenizer.totals.copy_(torch.where(column, fresh * usage[:, None], tokenizer.totals))
