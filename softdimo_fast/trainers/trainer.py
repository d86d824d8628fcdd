"""The training loop: accumulate, clip, step, average, log, save. It knows no algorithm and no model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from softdimo_fast import _config
from softdimo_fast.diffusion import Draws
from softdimo_fast.trainers import checkpoint
from softdimo_fast.trainers.ema import Ema, EmaConfig
from softdimo_fast.trainers.means import Means
from softdimo_fast.trainers.method import Method, MicroBatch, Phase
from softdimo_fast.trainers.optimization import RoleOptimizer
from softdimo_fast.trainers.progress import NoProgress, Progress
from softdimo_fast.trainers.run_log import RunLog
from softdimo_fast.trainers.stopping import StopRequest


class NonFiniteError(RuntimeError):
    """A loss or a gradient was not finite."""


class Stopped(Exception):
    """The run was asked to stop; its state is saved."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The loop's own settings.

    Attributes:
        batch_size: samples of one step, over all its micro-batches.
        accumulation: micro-batches of one step; they change memory and time, not what is computed.
        log_every, checkpoint_every: in steps. The device is waited for only then.
        keep_checkpoints: the newest ones that stay.
        nan_policy: a loss or gradient that is not finite never reaches a weight. ``"raise"`` ends the run
            at the next log line or checkpoint and names the first bad step; ``"skip"`` goes on, up to
            ``nan_limit``.
        autocast: the forward passes' precision; weights and optimizer states stay float32.
    """

    seed: int = 0
    steps: int = 1000
    batch_size: int = 64
    accumulation: int = 1
    log_every: int = 50
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    nan_policy: Literal["raise", "skip"] = "raise"
    nan_limit: int = 10
    autocast: Literal["none", "bfloat16"] = "none"
    device: str = "cpu"
    ema: EmaConfig = field(default_factory=EmaConfig)
    sinks: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        _config.require_types(self)
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints"):
            _config.require_range(self, name, getattr(self, name), minimum=1)
        _config.require_range(self, "accumulation", self.accumulation, minimum=1)
        _config.require(
            self.batch_size % self.accumulation == 0, self, "accumulation", self.accumulation,
            f"a divisor of batch_size = {self.batch_size}",
        )  # fmt: skip
        _config.require_range(self, "nan_limit", self.nan_limit, minimum=0)
        try:
            torch.device(self.device)
        except RuntimeError:
            _config.require(
                False, self, "device", self.device, "a device such as 'cpu' or 'cuda:0'"
            )


class Trainer:
    """Runs a method in a folder, from its newest checkpoint if there is one and ``resume`` is set."""

    def __init__(
        self,
        method: Method,
        config: TrainerConfig,
        *,
        folder: Path | None = None,
        run_config: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Args:
        folder: for the log and the checkpoints; None keeps nothing.
        run_config: stored in each checkpoint; a resume with another one is refused.
        """
        self.method, self.config, self.folder = method, config, folder
        self.run_config = dict(run_config or {})
        self.progress = progress or NoProgress()
        self.device = torch.device(config.device)
        for module in method.roles.values():
            module.to(self.device)
        self.optimizers = {
            role: RoleOptimizer(module, method.optimizers[role])
            for role, module in method.roles.items()
        }
        self.averages = {
            role: Ema(method.roles[role], config.ema) for role in method.averaged_roles
        }
        self.step = 0
        self._means = Means()
        self._bad_steps = torch.zeros((), device=self.device)
        self._first_bad = torch.full((), -1.0, device=self.device)

    # -----------------------------------------------------------------------------------------------
    # the loop

    def run(self, *, resume: bool = False, stop: Callable[[], bool] | None = None) -> None:
        """Trains to the last step.

        Raises:
            Stopped: a signal (or ``stop``) asked for it; the state is saved.
            NonFiniteError: by the NaN policy.
            CheckpointError: ``resume`` was asked for, but no checkpoint is usable; or it was not, and the
                folder holds a run already.
        """
        # First of all: a Ctrl-C while a checkpoint is read is a stop too.
        with StopRequest() as request, closing(self.progress):
            if resume:
                self.resume()
            elif self.step == 0 and self._holds_a_run():
                raise checkpoint.CheckpointError(
                    f"{self.folder} holds a run already: resume it, or choose another folder"
                )
            with self._open_log() as log:
                self._loop(log, lambda: request.requested or (stop is not None and stop()))

    def _loop(self, log: RunLog | None, stop: Callable[[], bool]) -> None:
        started, first = time.monotonic(), self.step
        while self.step < self.config.steps:
            self.train_step()
            last = self.step == self.config.steps
            if last or self.step % self.config.log_every == 0:
                samples = (self.step - first) * self.config.batch_size
                self._log(log, samples / (time.monotonic() - started))
            self.progress.update(self.step)
            stopping = stop()
            if last or stopping or self.step % self.config.checkpoint_every == 0:
                self.save()
            if stopping and not last:
                raise Stopped(
                    f"stopped at step {self.step} of {self.config.steps}; saved, resume to go on"
                )

    def _holds_a_run(self) -> bool:
        return self.folder is not None and bool(checkpoint.find(self.folder / "checkpoints"))

    def train_step(self) -> None:
        """One step: every phase of the method, then the averages. Never waits for the device."""
        batches = self._micro_batches()
        phases = self.method.phases(self.step)
        for phase in phases:
            norm = self._run_phase(phase, batches)
            repeats = sum(other.role == phase.role for other in phases)
            self._means.add({f"{phase.role}/gradient_norm": norm / repeats})
        self._means.add(self.method.finish_step(self.step, batches))
        for role, average in self.averages.items():
            average.update(self.method.roles[role], self.step)
        self._means.end_step()
        self.step += 1

    def _micro_batches(self) -> list[MicroBatch]:
        size, count = self.config.batch_size, self.config.accumulation
        whole = Draws.of(self.config.seed, self.step, size, device=self.device)
        return [
            MicroBatch(whole.part(first, size // count), whole)
            for first in range(0, size, size // count)
        ]

    def _run_phase(self, phase: Phase, batches: list[MicroBatch]) -> Tensor:
        """One optimizer step; returns the gradient norm before clipping."""
        optimizer = self.optimizers[phase.role]
        optimizer.zero_grad()
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for batch in batches:
            with self._precision():
                loss, metrics = self.method.loss(phase, batch)
            loss.backward()
            finite = finite & loss.detach().isfinite()
            self._means.add(metrics)
        first = self.method.first_step(phase.role)
        norm, bad = optimizer.step(self.step - first, self.config.steps - first, finite)
        optimizer.zero_grad()
        unseen = (self._first_bad < 0) & (bad > 0)
        self._first_bad = torch.where(unseen, float(self.step), self._first_bad)
        self._bad_steps = self._bad_steps + bad
        return norm

    def _precision(self) -> AbstractContextManager[Any]:
        if self.config.autocast == "none":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    # -----------------------------------------------------------------------------------------------
    # metrics

    def _open_log(self) -> AbstractContextManager[RunLog | None]:
        if self.folder is None:
            return nullcontext()
        log = RunLog(self.folder, sinks=self.config.sinks)
        log.truncate_after(self.step)
        return log

    def _log(self, log: RunLog | None, samples_per_second: float) -> None:
        scalars = self._read_metrics()
        if log is not None:
            log.write(self.step, **scalars, samples_per_second=samples_per_second)

    def _read_metrics(self) -> dict[str, float]:
        """The interval's means, in one transfer; then the NaN policy."""
        scalars, (bad_steps, first_bad) = self._means.read(self._bad_steps, self._first_bad)
        self._apply_nan_policy(int(bad_steps), int(first_bad))
        for role, optimizer in self.optimizers.items():
            scalars[f"{role}/learning_rate"] = optimizer.optimizer.param_groups[0]["lr"]
        if bad_steps:
            scalars["skipped_updates"] = bad_steps
        return scalars

    def _apply_nan_policy(self, bad_steps: int, first_bad: int) -> None:
        limit = 0 if self.config.nan_policy == "raise" else self.config.nan_limit
        if bad_steps <= limit:
            return
        raise NonFiniteError(
            f"the loss or its gradient was not finite in {bad_steps} updates, the first at step {first_bad} "
            f"(seed {self.config.seed} and that step reproduce it); nan_policy is "
            f"{self.config.nan_policy!r} with a limit of {limit}. No weight took such an update."
        )

    # -----------------------------------------------------------------------------------------------
    # checkpoints

    def save(self) -> Path | None:
        """Writes a checkpoint of everything that the next step depends on.

        Raises:
            NonFiniteError: the NaN policy ends the run. Its checkpoint would fail again at every resume.
        """
        if self.folder is None:
            return None
        bad_steps, first_bad = torch.stack([self._bad_steps, self._first_bad]).tolist()
        self._apply_nan_policy(int(bad_steps), int(first_bad))
        tensors: dict[str, Mapping[str, Tensor]] = {}
        sums, steps = self._means.state()
        for role, module in self.method.roles.items():
            optimizer = self.optimizers[role]
            tensors[role] = module.state_dict()
            tensors[f"{role}_optimizer"] = checkpoint.optimizer_tensors(
                optimizer.optimizer, optimizer.names
            )
        for role, average in self.averages.items():
            tensors[f"{role}_average"] = average.module.state_dict()
        tensors["trainer"] = {
            "bad_steps": self._bad_steps,
            "first_bad": self._first_bad,
            **{f"sums/{name}": value for name, value in sums.items()},
        }
        return checkpoint.save(
            self.folder / "checkpoints", self.step, tensors=tensors,
            state={"seed": self.config.seed, "steps_summed": {**steps}}, config=self.run_config,
            keep=self.config.keep_checkpoints,
        )  # fmt: skip

    def resume(self) -> None:
        """Goes back to the newest usable checkpoint.

        Raises:
            CheckpointError: there is none, or it is of another configuration. A resume that was asked for
                never starts from zero.
        """
        if self.folder is None:
            raise checkpoint.CheckpointError("a run without a folder has nothing to resume from")
        loaded = checkpoint.load(self.folder / "checkpoints", device=self.device)
        self._require_same_config(loaded)
        for role, module in self.method.roles.items():
            checkpoint.restore(role, module.state_dict(), loaded.group(role))
            optimizer = self.optimizers[role]
            checkpoint.load_optimizer_tensors(
                optimizer.optimizer, optimizer.names, loaded.group(f"{role}_optimizer")
            )
        for role, average in self.averages.items():
            checkpoint.restore(
                f"{role}_average", average.module.state_dict(), loaded.group(f"{role}_average")
            )
        trainer = dict(loaded.group("trainer"))
        self._bad_steps, self._first_bad = trainer.pop("bad_steps"), trainer.pop("first_bad")
        sums = {name.removeprefix("sums/"): value for name, value in trainer.items()}
        self._means.restore(sums, loaded.state["steps_summed"])
        self.step = loaded.step
        # A damaged newer one, which was passed over, would be in the way of the next save.
        checkpoint.discard_after(self.folder / "checkpoints", self.step)

    def _require_same_config(self, loaded: checkpoint.Checkpoint) -> None:
        changes = _config.difference(loaded.config, self.run_config)
        # The run's config may leave it out, and every random number depends on it.
        changes = changes or _config.difference(
            {"seed": loaded.state["seed"]}, {"seed": self.config.seed}
        )
        if changes:
            raise checkpoint.CheckpointError(
                f"{loaded.path} was made with another configuration:\n  " + "\n  ".join(changes)
                + "\nUse that configuration, or another folder."
            )  # fmt: skip
