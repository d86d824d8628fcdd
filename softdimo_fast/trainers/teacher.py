"""Training a masked-diffusion teacher: cross-entropy at the [MASK] positions.

Sources: MaskGIT (arXiv 2202.04200); classifier-free guidance (arXiv 2207.12598) for the dropped labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from softdimo_fast import _config
from softdimo_fast.diffusion import Draws, draw_mask, draw_masked_count
from softdimo_fast.diffusion.masking import MaskSchedule
from softdimo_fast.models.conditions import Condition, select
from softdimo_fast.models.protocol import MaskedDiffusionModel
from softdimo_fast.ops import masked_cross_entropy
from softdimo_fast.trainers.method import Loss, Method, MicroBatch, Phase
from softdimo_fast.trainers.optimization import OptimizerConfig

# Tokens and conditions of a micro-batch's samples.
TokenSource = Callable[[Draws], tuple[Tensor, Condition]]


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Options of :class:`TeacherMethod`.

    Attributes:
        condition_drop: the share of samples that train the unconditional branch.
    """

    mask_schedule: MaskSchedule = "arccos"
    condition_drop: float = 0.1
    label_smoothing: float = 0.0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require_range(self, "condition_drop", self.condition_drop, minimum=0, maximum=1)
        _config.require_range(self, "label_smoothing", self.label_smoothing, minimum=0, below=1)


class TeacherMethod(Method):
    """Role ``teacher``."""

    def __init__(
        self, teacher: MaskedDiffusionModel, tokens: TokenSource, config: TeacherConfig
    ) -> None:
        self.teacher, self.tokens, self.config = teacher, tokens, config

    @property
    def roles(self) -> Mapping[str, MaskedDiffusionModel]:
        return {"teacher": self.teacher}

    @property
    def optimizers(self) -> Mapping[str, OptimizerConfig]:
        return {"teacher": self.config.optimizer}

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("teacher"),)

    def loss(self, phase: Phase, batch: MicroBatch) -> Loss:
        config, model = self.config, self.teacher
        tokens, condition = self.tokens(batch.draws)
        dropped = batch.draws.uniform("teacher/drop", 1)[:, 0] < config.condition_drop
        condition = select(dropped, model.unconditional(condition), condition)
        masked = draw_mask(batch.draws, "teacher", config.mask_schedule, model.token_shape)
        logits = model.logits(
            model.embed(model.masked_tokens(tokens, masked.mask)),
            model.masked_condition(condition, masked.mask),
            masked.rows,
        )
        total = masked_cross_entropy(
            logits, masked.of(tokens), masked.row_mask, label_smoothing=config.label_smoothing,
            reduction="sum",
        )  # fmt: skip
        # Over the masked positions of the whole step: micro-batches then add up to it exactly.
        counted = draw_masked_count(
            batch.global_draws, "teacher", config.mask_schedule, tokens[0].numel()
        ).sum()
        loss = total / counted
        return Loss(loss, {"cross_entropy": loss.detach()})
