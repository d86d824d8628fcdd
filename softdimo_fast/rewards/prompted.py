"""What rewards of text-to-image models share: the words behind a condition, and CLIP's view of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softdimo_fast.data.prompts import EncodedPrompts
from softdimo_fast.diffusion.draws import send
from softdimo_fast.models.conditions import Condition, map_condition

CLIP_MEAN, CLIP_STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)


class PromptedReward(nn.Module):
    """A frozen reward that reads prompts.

    A condition says which: it is a NamedTuple with int64 numbers ``prompt`` ``[B]`` into the prompts that the
    reward was built with (:class:`~softdimo_fast.data.prompts.PromptConditions` sets them), or that tensor
    itself. Class labels work too, with one prompt for each class.

    What a model makes of prompts is kept. To know which ones it has, every call reads the numbers on the
    host, and waits for the GPU to do so; after :meth:`encode_prompts` nothing waits.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        encode: Callable[[Sequence[str]], Condition],
        *,
        capacity: int = 16384,
        chunk: int = 16,
    ) -> None:
        """
        Args:
            prompts: the same, in the same order, as those that the conditions count.
            encode: prompts -> a tensor or a NamedTuple of tensors, prompts first.
            capacity: how many encoded prompts are kept.
            chunk: how many are encoded at a time.
        """
        super().__init__()
        self._encoded = EncodedPrompts(prompts, encode, capacity=capacity, chunk=chunk)
        self._chunk = chunk
        self._table: Condition = None

    @property
    def prompts(self) -> Sequence[str]:
        """All prompts."""
        return self._encoded.prompts

    def train(self, mode: bool = True) -> Self:
        """Keeps the model in eval mode, whatever mode a trainer sets."""
        return super().train(False)

    def encode_prompts(self) -> None:
        """Encodes all prompts now, where the model is (CLIP: 4 KB each), so that no step waits for them."""
        parts = range(0, len(self.prompts), self._chunk)
        self._table = map_condition(
            lambda *tensors: torch.cat(tensors),
            *(self._encoded(range(len(self.prompts))[i : i + self._chunk]) for i in parts),
        )

    def words(self, condition: Condition, images: Tensor) -> Condition:
        """What ``encode`` made of the prompts of ``condition``, one for each image.

        Raises:
            TypeError: the condition has no prompts' numbers.
            ValueError: there are not as many of them as images, or there is no such prompt (on a GPU, where
                the check would wait for it, such a row is of the first prompt, and :meth:`known` says so).
        """
        numbers = prompt_numbers(condition)
        if len(numbers) != len(images):
            raise ValueError(
                f"{type(self).__name__}: condition must have {len(images)} prompts, one for each image, got "
                f"{len(numbers)}"
            )
        if self._table is None:
            found = self._encoded(numbers.tolist())
            return map_condition(lambda t: send(t, images.device), found)
        known = self.known(numbers)
        if numbers.device.type == "cpu":
            self._check_known(numbers, known)
        safe = send(torch.where(known, numbers, 0), images.device)
        return map_condition(lambda t: t.to(images.device)[safe], self._table)

    def _check_known(self, numbers: Tensor, known: Tensor) -> None:
        if not bool(known.all()):
            raise ValueError(
                f"{type(self).__name__}: there is no prompt number {int(numbers[~known][0])}: there are "
                f"{len(self.prompts)}, counted from 0"
            )

    def known(self, numbers: Tensor) -> Tensor:
        """Which of the numbers are prompts', bool ``[B]``."""
        return (numbers >= 0) & (numbers < len(self.prompts))


def prompt_numbers(condition: Condition) -> Tensor:
    """int64 ``[B]``, of a condition with a field ``prompt``, or that tensor itself.

    Raises:
        TypeError: ``condition`` is neither.
    """
    numbers = condition if isinstance(condition, Tensor) else getattr(condition, "prompt", None)
    if not isinstance(numbers, Tensor) or numbers.dtype != torch.int64 or numbers.dim() != 1:
        raise TypeError(
            "condition must be int64 numbers [B] of prompts, or a NamedTuple with such a field 'prompt', got "
            f"{_brief(condition)}"
        )
    return numbers


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """What CLIP's image tower sees of images: resized bicubically, cut at the centre, normalised.

    As ReNO's ``clip_img_transform`` (torchvision's ``Resize`` with antialiasing, ``CenterCrop``,
    ``Normalize``), differentiable. The filter is applied as two matrix products: unlike the backward pass of
    ``interpolate`` on a GPU, theirs adds in a fixed order.

    Args:
        images: floating ``[B, 3, h, w]`` in [-1, 1]; what lies outside is clamped, as in the saved picture.
        size: of the result.

    Returns:
        float32 (float64) ``[B, 3, size, size]``.

    Raises:
        TypeError, ValueError: ``images`` has another dtype or shape.
    """
    if not images.is_floating_point():
        raise TypeError(f"clip_pixels: images must be floating point, got {images.dtype}")
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(
            f"clip_pixels: images must have shape [B, 3, h, w], got {list(images.shape)}"
        )
    height, width = images.shape[-2:]
    short = min(height, width)
    dtype = torch.promote_types(images.dtype, torch.float32)
    with torch.autocast(images.device.type, enabled=False):
        pixels = ((images.to(dtype) + 1) / 2).clamp(0, 1)
        rows = _filter(height, int(size * height / short), size, dtype, images.device)
        columns = _filter(width, int(size * width / short), size, dtype, images.device)
        pixels = rows @ pixels @ columns.T
        mean, std = _statistics(dtype, images.device)
        return (pixels - mean) / std


# Kept where they are used: to make them there anew would wait for a GPU.
@lru_cache(maxsize=8)
def _statistics(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(values, dtype=dtype).view(3, 1, 1).to(device)
        for values in (CLIP_MEAN, CLIP_STD)
    )
    return mean, std


@lru_cache(maxsize=64)
def _filter(
    length: int, resized: int, size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``[size, length]``: the bicubic filter from ``length`` to ``resized`` pixels, its middle rows."""
    pixels = torch.eye(length, dtype=torch.float64)
    if resized != length:
        # The columns of the identity, each resized in one direction, are the filter's columns.
        pixels = F.interpolate(
            pixels[None, None],
            (resized, length),
            mode="bicubic",
            antialias=True,
            align_corners=False,
        )[0, 0]
    top = round((resized - size) / 2)
    return pixels[top : top + size].to(device, dtype)


def _brief(condition: Condition) -> str:
    if isinstance(condition, Tensor):
        return f"{condition.dtype} {list(condition.shape)}"
    return type(condition).__name__
