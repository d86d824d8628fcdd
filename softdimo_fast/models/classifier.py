"""Small image classifiers: one judges generated images, the other is what a reward asks.

A generator trained on a reward learns the reward's mistakes too. The judge is therefore another network:
convolutions there, a perceptron here. Neither has dropout, which would draw from torch's global generator.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from softdimo_fast import _config


@dataclass(frozen=True, kw_only=True)
class _ImageClassifierConfig:
    """What both networks have."""

    image_size: int = 8
    channels: int = 1
    num_classes: int = 10

    def __post_init__(self) -> None:
        _config.require_types(self)
        for field in fields(self):
            if field.name != "kind":
                _config.require_range(self, field.name, getattr(self, field.name), minimum=1)


@dataclass(frozen=True, kw_only=True)
class ConvClassifierConfig(_ImageClassifierConfig):
    """Of a :class:`ConvClassifier`.

    Attributes:
        image_size: height and width; even.
        channels: of the images.
        num_classes: number of logits.
        width: channels of the first convolution; the others have twice as many.
        feature_dim: length of the feature vector.
        kind: tells the two classifiers' configs apart where either may stand.
    """

    kind: Literal["conv"] = "conv"
    width: int = 16
    feature_dim: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        _config.require(self.image_size % 2 == 0, self, "image_size", self.image_size, "even")


@dataclass(frozen=True, kw_only=True)
class MlpClassifierConfig(_ImageClassifierConfig):
    """Of an :class:`MlpClassifier`.

    Attributes:
        image_size: height and width.
        channels: of the images.
        num_classes: number of logits.
        width: of the two hidden layers.
        kind: tells the two classifiers' configs apart where either may stand.
    """

    kind: Literal["mlp"] = "mlp"
    width: int = 128


class _ImageClassifier(nn.Module):
    """A body that gives pre-activation features, and a linear head on their GELU."""

    def __init__(self, config: _ImageClassifierConfig, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head
        self.image_shape = (config.channels, config.image_size, config.image_size)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features ``[B, F]`` of images floating ``[B, C, h, w]``, before the activation.

        Raises:
            ValueError: the images have another shape than the config says.
        """
        if images.dim() != 4 or images.shape[1:] != self.image_shape:
            raise ValueError(
                f"{type(self).__name__}: images must have shape [B, "
                f"{', '.join(map(str, self.image_shape))}], got {list(images.shape)}"
            )
        features: Tensor = self.body(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, C, h, w]``."""
        logits: Tensor = self.head(functional.gelu(self.features(images)))
        return logits


class ConvClassifier(_ImageClassifier):
    """The judge: three convolutions and a small feature layer, in which Frechet distances are measured.

    Features before the activation, because a Gaussian fits them better than rectified ones.
    """

    def __init__(self, config: ConvClassifierConfig) -> None:
        c, w = config, config.width
        body = nn.Sequential(
            nn.Conv2d(c.channels, w, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(w, 2 * w, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(2 * w, 2 * w, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(2 * w * (c.image_size // 2) ** 2, c.feature_dim),
        )
        head = nn.Linear(c.feature_dim, c.num_classes)
        super().__init__(c, body, head)
        self.config = config


class MlpClassifier(_ImageClassifier):
    """The reward's classifier: a perceptron with two hidden layers on the pixels."""

    def __init__(self, config: MlpClassifierConfig) -> None:
        c = config
        body = nn.Sequential(
            nn.Flatten(),
            nn.Linear(c.channels * c.image_size**2, c.width),
            nn.GELU(),
            nn.Linear(c.width, c.width),
        )
        head = nn.Linear(c.width, c.num_classes)
        super().__init__(c, body, head)
        self.config = config
