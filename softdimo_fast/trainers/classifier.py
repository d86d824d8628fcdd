"""Training an image classifier: the reward's and the judge's in the digits run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional as F

from softdimo_fast import _config
from softdimo_fast.diffusion import Draws
from softdimo_fast.trainers.method import Loss, Method, MicroBatch, Phase
from softdimo_fast.trainers.optimization import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Options of :class:`ClassifierMethod`.

    Attributes:
        input_noise: standard deviation of the Gaussian noise on the images.
    """

    input_noise: float = 0.05
    label_smoothing: float = 0.05
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require_range(self, "input_noise", self.input_noise, minimum=0)
        _config.require_range(self, "label_smoothing", self.label_smoothing, minimum=0, maximum=1)


class ClassifierMethod(Method):
    """Role ``classifier``; ``images`` gives a micro-batch's images and classes."""

    def __init__(
        self,
        classifier: nn.Module,
        images: Callable[[Draws], tuple[Tensor, Tensor]],
        config: ClassifierConfig,
    ) -> None:
        self.classifier, self.images, self.config = classifier, images, config

    @property
    def roles(self) -> Mapping[str, nn.Module]:
        return {"classifier": self.classifier}

    @property
    def optimizers(self) -> Mapping[str, OptimizerConfig]:
        return {"classifier": self.config.optimizer}

    @property
    def averaged_roles(self) -> Sequence[str]:
        return ()

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("classifier"),)

    def loss(self, phase: Phase, batch: MicroBatch) -> Loss:
        images, classes = self.images(batch.draws)
        noise = batch.draws.normal("classifier/noise", *images.shape[1:])
        logits = self.classifier(images + self.config.input_noise * noise)
        loss = F.cross_entropy(logits, classes, label_smoothing=self.config.label_smoothing)
        accuracy = (logits.detach().argmax(-1) == classes).float().mean()
        share = batch.share
        return Loss(
            loss * share, {"cross_entropy": loss.detach() * share, "accuracy": accuracy * share}
        )
