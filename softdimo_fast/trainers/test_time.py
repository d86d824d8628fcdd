"""Test-time embedding optimisation (TTEO) of Soft-Di[M]O (arXiv 2509.22925), with Best-of-N.

No weight changes: the generator's input embeddings move so that a reward of the softly decoded image rises,
e* = argmax_e R(Dec(softmax(z_theta(e)) codebook), target). It is no trainer but a batched function; every
sample is optimised on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from softdimo_fast import _config
from softdimo_fast.diffusion import Draws, OneStepConfig, decode_logits, one_step_input
from softdimo_fast.diffusion.samplers import Decode
from softdimo_fast.models.conditions import Condition, batch_size, rows, select
from softdimo_fast.models.protocol import MaskedDiffusionModel, Tokenizer
from softdimo_fast.rewards.protocol import Reward


@dataclass(frozen=True, kw_only=True)
class TestTimeConfig:
    """Options of :class:`TestTimeEmbeddingOptimizer`.

    Attributes:
        candidates: N of Best-of-N; the start is the one of N inputs with the best reward.
        iterations: gradient steps from there; 0 is Best-of-N alone. The paper makes 2 or 4.
        optimizer, learning_rate, momentum: SGD at 0.2 is the paper's. The loss is the sum over samples, so
            that the step does not depend on the batch.
        regularization: added to the loss, times ``regularization_weight``: ``"distance"`` |e - e0|^2, or
            ``"norm"`` |e|^2 / 2 - (d - 1) log |e| (ReNO, arXiv 2406.04312).
        one_step: the generator's input and draw.
        decode: of the final images.
        batch_size: samples optimised at once; bounds memory, changes no result.
    """

    __test__ = False

    candidates: int = 1
    iterations: int = 4
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 0.2
    momentum: float = 0.0
    regularization: Literal["none", "distance", "norm"] = "none"
    regularization_weight: float = 0.0
    one_step: OneStepConfig = field(default_factory=OneStepConfig)
    decode: Decode = "sample"
    batch_size: int = 256

    def __post_init__(self) -> None:
        _config.require_types(self)
        _config.require_range(self, "candidates", self.candidates, minimum=1)
        _config.require_range(self, "iterations", self.iterations, minimum=0)
        _config.require_range(self, "learning_rate", self.learning_rate, minimum=0)
        _config.require_range(self, "momentum", self.momentum, minimum=0, maximum=1)
        _config.require(
            (self.regularization_weight != 0) == (self.regularization != "none"), self,
            "regularization_weight", self.regularization_weight,
            "non-zero where regularization is on, and 0 otherwise",
        )  # fmt: skip
        _config.require_range(self, "batch_size", self.batch_size, minimum=1)


@dataclass(frozen=True)
class TestTimeResult:
    """What the search found for each of B samples.

    Attributes:
        embeddings: the inputs with the best reward seen, ``[B, L, D]``.
        images: their decode, ``[B, C, height, width]``; ``initial_images`` of where they started.
        reward, initial_reward: of the soft decode, ``[B]``.
        history: ``[iterations + 1, B]``, the reward before each step and after the last.
    """

    __test__ = False

    embeddings: Tensor
    images: Tensor
    initial_images: Tensor
    reward: Tensor
    initial_reward: Tensor
    history: Tensor


class TestTimeEmbeddingOptimizer:
    """Searches and optimises generator inputs for a reward, in batches."""

    __test__ = False

    def __init__(
        self,
        generator: MaskedDiffusionModel,
        tokenizer: Tokenizer,
        reward: Reward,
        config: TestTimeConfig,
    ) -> None:
        self.generator = generator.eval().requires_grad_(False)
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.reward, self.config = reward, config

    def __call__(
        self,
        condition: Condition,
        target: Condition,
        draws: Draws,
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> TestTimeResult:
        """Args:
        condition: of the generator, ``[B]``.
        target: what the reward is asked about, ``[B]``; it may say more than the condition.
        stop: asked before each batch and iteration; True raises :class:`InterruptedError`.
        """
        if not batch_size(condition) == batch_size(target) == len(draws):
            raise ValueError(
                "TestTimeEmbeddingOptimizer: condition, target and draws must count the same samples, got "
                f"{batch_size(condition)}, {batch_size(target)} and {len(draws)}"
            )
        results = []
        size = self.config.batch_size
        for first in range(0, len(draws), size):
            part = slice(first, first + size)
            results.append(
                self._search(
                    rows(condition, part), rows(target, part),
                    draws.part(first, size), stop,
                )
            )  # fmt: skip
        fields = TestTimeResult.__dataclass_fields__
        return TestTimeResult(
            **{
                name: torch.cat([getattr(r, name) for r in results], dim=int(name == "history"))
                for name in fields
            }
        )

    def _search(
        self, condition: Condition, target: Condition, draws: Draws, stop: Callable[[], bool]
    ) -> TestTimeResult:
        start, start_reward, condition = self._best_of_n(condition, target, draws, stop)
        best, best_reward, history = self._optimise(start, start_reward, condition, target, stop)
        return TestTimeResult(
            best,
            self._images(best, condition, draws),
            self._images(start, condition, draws),
            best_reward,
            start_reward,
            history,
        )

    def _value(self, embeddings: Tensor, condition: Condition, target: Condition) -> Tensor:
        """The reward of the soft decode, ``[B]``."""
        logits = self.generator.generator_logits(embeddings, condition)
        value: Tensor = self.reward(self.tokenizer.decode_soft(logits, condition), target)
        return value

    @torch.no_grad()
    def _best_of_n(
        self, condition: Condition, target: Condition, draws: Draws, stop: Callable[[], bool]
    ) -> tuple[Tensor, Tensor, Condition]:
        """The best inputs, their reward, and the condition with what the model is told of their mask."""
        best: Tensor | None = None
        best_reward, best_told = torch.empty(0), condition
        for candidate in range(self.config.candidates):
            _poll(stop)
            embeddings, told = one_step_input(
                self.generator,
                condition,
                draws.fork(f"candidate/{candidate}"),
                self.config.one_step,
            )
            reward = self._value(embeddings, told, target)
            if best is None:
                best, best_reward, best_told = embeddings, reward, told
            else:
                best_told = select(_wins(reward, best_reward), told, best_told)
                best, best_reward = _better(embeddings, reward, best, best_reward)
        assert best is not None
        return best, best_reward, best_told

    def _optimise(
        self, start: Tensor, start_reward: Tensor, condition: Condition, target: Condition,
        stop: Callable[[], bool],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        embeddings = start.clone().requires_grad_(True)
        optimizer = self._optimizer(embeddings)
        best, best_reward, history = start, start_reward, []
        for iteration in range(self.config.iterations + 1):
            _poll(stop)
            with torch.set_grad_enabled(iteration < self.config.iterations):
                reward = self._value(embeddings, condition, target)
                loss = self._regularization(embeddings, start) - reward.sum()
            history.append(reward.detach())
            best, best_reward = _better(
                embeddings.detach().clone(), reward.detach(), best, best_reward
            )
            if iteration < self.config.iterations:
                (embeddings.grad,) = torch.autograd.grad(loss, embeddings)
                optimizer.step()
        return best, best_reward, torch.stack(history)

    def _optimizer(self, embeddings: Tensor) -> torch.optim.Optimizer:
        if self.config.optimizer == "adam":
            return torch.optim.Adam([embeddings], self.config.learning_rate)
        return torch.optim.SGD(
            [embeddings], self.config.learning_rate, momentum=self.config.momentum
        )

    def _regularization(self, embeddings: Tensor, start: Tensor) -> Tensor:
        weight = self.config.regularization_weight
        if self.config.regularization == "none":
            return embeddings.new_zeros(())
        if self.config.regularization == "distance":
            return weight * (embeddings - start).square().sum()
        flat = embeddings.flatten(1)
        square = flat.square().sum(1)
        return weight / 2 * (square - (flat.shape[1] - 1) * square.log()).sum()

    @torch.no_grad()
    def _images(self, embeddings: Tensor, condition: Condition, draws: Draws) -> Tensor:
        logits = self.generator.generator_logits(embeddings, condition)
        return decode_logits(
            self.tokenizer, logits, draws, self.config.decode,
            temperature=self.config.one_step.temperature, condition=condition,
        )  # fmt: skip


def _poll(stop: Callable[[], bool]) -> None:
    if stop():
        raise InterruptedError("the search was asked to stop")


def _wins(reward: Tensor, best_reward: Tensor) -> Tensor:
    return (reward > best_reward) | (best_reward.isnan() & ~reward.isnan())


def _better(
    challenger: Tensor, reward: Tensor, best: Tensor, best_reward: Tensor
) -> tuple[Tensor, Tensor]:
    """Sample by sample the input with the larger reward; the earlier one on ties; NaN never wins."""
    wins = _wins(reward, best_reward)
    column = wins.view(-1, *[1] * (best.dim() - 1))
    return torch.where(column, challenger, best), torch.where(wins, reward, best_reward)
