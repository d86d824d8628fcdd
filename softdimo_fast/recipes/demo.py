"""The digits demo as stages: from classifiers and tokenizer to TTEO, through the same trainers as any run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from softdimo_fast import _config
from softdimo_fast.data import load_digits
from softdimo_fast.diffusion.samplers import Decode
from softdimo_fast.recipes import digits
from softdimo_fast.recipes.build import build_trainer, trained_role
from softdimo_fast.recipes.evaluation import SEARCHES, TEACHER_STEPS, Evaluator, Measured, Rows
from softdimo_fast.recipes.runs import (
    ClassifierRun,
    GeneratorRun,
    TeacherRun,
    TestTimeRun,
    TokenizerRun,
    TrainingRun,
)
from softdimo_fast.recipes.stages import Report, Stage, StageContext, StageResult
from softdimo_fast.trainers import Stopped, checkpoint

# Which images of which stage are measured: row name -> decode.
GENERATOR_ROWS: Mapping[str, Mapping[str, Decode]] = {
    "distillation": {"dimo": "sample", "dimo_argmax": "argmax", "dimo_soft": "soft"},
    "control": {"cfg2_control": "sample"},
    "adversarial": {"cfg2_gan": "sample"},
    "reward": {"reward": "sample"},
}
SAMPLES, QUICK_SAMPLES = 2000, 400
QUICK_COST = 0.15  # of a stage, next to the full one


class _StageProgress:
    """Tells a stage's progress by the trainer's steps, a few times a second."""

    def __init__(self, report: Report, total: int) -> None:
        self._report, self._total, self._last = report, total, 0.0

    def update(self, step: int, **text: object) -> None:
        now = time.monotonic()
        if now - self._last > 0.2 or step == self._total:
            self._last = now
            self._report(step, self._total)

    def close(self) -> None:
        pass


def _stop_if_asked(context: StageContext) -> None:
    if context.stop():
        raise Stopped("stopped between two measurements")


def _result(measured: list[Measured]) -> StageResult:
    rows = {name: row for m in measured for name, row in m.rows.items()}
    images = {name: shown for m in measured for name, shown in m.images.items()}
    return StageResult({"rows": rows}, images)


def _train(run: TrainingRun, context: StageContext) -> None:
    progress = _StageProgress(context.report, run.trainer.steps)
    trainer = build_trainer(run, context.folder, progress)
    begun = bool(checkpoint.find(context.folder / "checkpoints"))
    trainer.run(resume=begun, stop=context.stop)


@dataclass(frozen=True)
class ClassifierWork:
    """Trains a classifier; measures its accuracy on held-out scans."""

    run: Any

    @torch.no_grad()
    def __call__(self, context: StageContext) -> StageResult:
        with torch.enable_grad():
            _train(self.run, context)
        classifier = trained_role(context.folder, "classifier")
        held_out = load_digits().held_out
        hits = classifier(held_out.images).argmax(1) == held_out.digits
        return StageResult({"held_out_accuracy": float(hits.double().mean())})


@dataclass(frozen=True)
class TokenizerWork:
    """Trains the tokenizer; measures its reconstruction of held-out scans."""

    run: Any

    @torch.no_grad()
    def __call__(self, context: StageContext) -> StageResult:
        with torch.enable_grad():
            _train(self.run, context)
        tokenizer = trained_role(context.folder, "tokenizer")
        images = load_digits().held_out.images
        tokens = tokenizer.encode(images)
        error = (tokenizer.decode(tokens) - images).square().mean()
        return StageResult(
            {"held_out_squared_error": float(error), "codes_used": len(tokens.unique())}
        )


@dataclass(frozen=True)
class TeacherWork:
    """Trains the teacher."""

    run: TeacherRun

    def __call__(self, context: StageContext) -> StageResult:
        _train(self.run, context)
        return StageResult()


@dataclass(frozen=True)
class ReferenceWork:
    """Measures real images, reconstructions, and the teacher with 1 to 16 forward passes."""

    run: TeacherRun
    seed: int
    samples: int

    def __call__(self, context: StageContext) -> StageResult:
        evaluator = Evaluator(context.folder.parent, seed=self.seed, samples=self.samples)
        measured, done, total = [evaluator.references()], 0, sum(TEACHER_STEPS)
        for steps in TEACHER_STEPS:
            _stop_if_asked(context)
            measured.append(evaluator.teacher(self.run, steps))
            done += steps
            context.report(done, total)
        return _result(measured)


@dataclass(frozen=True)
class GeneratorWork:
    """Trains a one-step generator and measures its images."""

    stage: str
    run: GeneratorRun
    seed: int
    samples: int

    def __call__(self, context: StageContext) -> StageResult:
        _train(self.run, context)
        evaluator = Evaluator(context.folder.parent, seed=self.seed, samples=self.samples)
        return _result([evaluator.generator(self.stage, self.run, GENERATOR_ROWS[self.stage])])


@dataclass(frozen=True)
class SearchWork:
    """Best-of-N and TTEO for a wanted digit, which the condition does not say."""

    run: TestTimeRun
    seed: int

    def __call__(self, context: StageContext) -> StageResult:
        evaluator = Evaluator(context.folder.parent, seed=self.seed, samples=self.run.samples)
        rows: Rows = {}
        images: dict[str, Tensor] = {}
        for done, (candidates, iterations) in enumerate(SEARCHES, start=1):
            _stop_if_asked(context)
            measured = evaluator.search(self.run, candidates, iterations)
            rows |= measured.rows
            if (candidates, iterations) == (1, 4):
                images = measured.images
            context.report(done, len(SEARCHES))
        return StageResult({"search": rows}, images)


# ---------------------------------------------------------------------------------------------------
# the graph


def demo_stages(seed: int, *, quick: bool = False) -> list[Stage]:
    """The demo's stages. ``quick`` cuts every training to a few steps: all code runs, nothing gets good."""
    samples = QUICK_SAMPLES if quick else SAMPLES

    def cut(run: Any) -> Any:
        return _quick(run) if quick else run

    judge, reward_classifier = cut(digits.judge(seed)), cut(digits.reward_classifier(seed + 1))
    tokenizer, teacher = cut(digits.tokenizer(seed)), cut(digits.teacher(seed))
    search = cut(digits.tteo(seed))
    stages = [
        _stage("judge", "judge", (), ClassifierWork(judge), judge, 7),
        _stage(
            "reward_classifier", "reward's classifier", (), ClassifierWork(reward_classifier),
            reward_classifier, 4,
        ),
        _stage("tokenizer", "tokenizer", (), TokenizerWork(tokenizer), tokenizer, 24),
        _stage("teacher", "teacher", ("tokenizer",), TeacherWork(teacher), teacher, 75),
        _stage(
            "teacher_samples", "teacher's images", ("teacher", "judge"),
            ReferenceWork(teacher, seed, samples), teacher, 10,
        ),
    ]  # fmt: skip
    generators = {
        "distillation": (digits.distillation, "Di[M]O", ("teacher", "judge"), 85),
        "control": (digits.control, "Di[M]O, guided", ("distillation",), 15),
        "adversarial": (digits.adversarial, "Di[M]O, guided + GAN", ("distillation",), 25),
        "reward": (digits.reward, "Di[M]O + reward", ("distillation", "reward_classifier"), 10),
    }
    for name, (recipe, title, needs, cost) in generators.items():
        run = cut(recipe(seed))
        work = GeneratorWork(name, run, seed, samples)
        stages.append(_stage(name, title, needs, work, run, cost))
    stages.append(
        _stage(
            "search", "TTEO and Best-of-N", ("distillation", "reward_classifier"),
            SearchWork(search, seed), search, 6,
        )
    )  # fmt: skip
    return [replace(stage, cost=QUICK_COST * stage.cost) for stage in stages] if quick else stages


def _stage(
    name: str, title: str, needs: tuple[str, ...], work: Any, run: Any, cost: float
) -> Stage:
    config: dict[str, Any] = {"run": _config.to_dict(run)}
    if hasattr(work, "samples"):
        config["samples"] = work.samples
    return Stage(name, title, needs, work, config, cost)


def _quick(run: Any) -> Any:
    """A short form of a run: the same code paths, not the same quality."""
    if isinstance(run, TestTimeRun):
        return replace(run, samples=60)
    share = (
        5 if isinstance(run, ClassifierRun) else 20
    )  # numbers of a blind judge would say nothing
    steps = min(max(run.trainer.steps // share, 20), 150)
    trainer = replace(run.trainer, steps=steps, checkpoint_every=max(steps // 2, 1), log_every=10)
    run = replace(run, trainer=trainer)
    if isinstance(run, TokenizerRun):  # or it would have no codebook at its end
        run = replace(run, method=replace(run.method, start_step=steps // 2))
    if isinstance(run, GeneratorRun):
        generator = replace(run.generator, warmup_steps=run.generator.warmup_steps // 10)
        run = replace(run, generator=generator)
    return run
