"""What the demo measures: rows of images against held-out scans, the search, and the bars.

Every image is a function of the seed; the judge took no part in any training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softdimo_fast.data import load_digits
from softdimo_fast.diffusion import (
    ConfidenceSamplerConfig,
    Draws,
    OneStepConfig,
    confidence_sample,
    one_step_sample,
)
from softdimo_fast.diffusion.samplers import Decode
from softdimo_fast.metrics import evaluate_images
from softdimo_fast.recipes.build import digit_reward, trained_role
from softdimo_fast.recipes.runs import GeneratorRun, TeacherRun, TestTimeRun
from softdimo_fast.trainers import TestTimeEmbeddingOptimizer

TEACHER_STEPS = (1, 2, 4, 8, 16)
CONDITIONS = 2
Rows = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Measured:
    """Rows of metrics, and the first images of each for the picture."""

    rows: Rows
    images: dict[str, Tensor]


class Evaluator:
    """Measures images under the judge of one demo folder."""

    def __init__(self, out: Path, *, seed: int, samples: int, pictures: int = 16) -> None:
        self.out, self.samples, self.pictures = out, samples, pictures
        self.judge = trained_role(out / "judge", "classifier")
        self.tokenizer = trained_role(out / "tokenizer", "tokenizer")
        self.split = load_digits()
        with torch.no_grad():
            self.real_features = self.judge.features(self.split.held_out.images)
        self.draws = Draws.of(seed, 0, samples).fork("evaluation")
        self.condition = torch.arange(samples) % CONDITIONS

    def row(self, images: Tensor, condition: Tensor | None = None) -> dict[str, float]:
        """One row of the table."""
        wanted = self.condition if condition is None else condition
        return asdict(evaluate_images(self.judge, images, wanted, self.real_features))

    def shown(self, images: Tensor, condition: Tensor | None = None) -> Tensor:
        """The images for the picture: the first of each condition, even ones first."""
        wanted = self.condition if condition is None else condition
        each = self.pictures // CONDITIONS
        return torch.cat([images[wanted == c][:each] for c in range(CONDITIONS)])

    @torch.no_grad()
    def references(self) -> Measured:
        """``floor``: the training scans themselves; ``recon``: the same through the tokenizer."""
        train, held_out = self.split.train, self.split.held_out
        decoded = self.tokenizer.decode(self.tokenizer.encode(train.images))
        shown = self.shown(held_out.images, held_out.parity)
        return Measured(
            {
                "floor": self.row(train.images, train.parity),
                "recon": self.row(decoded, train.parity),
            },
            {
                "real": shown,
                "recon": self.tokenizer.decode(self.tokenizer.encode(shown)),
            },
        )

    def teacher(self, run: TeacherRun, steps: int) -> Measured:
        """``teacherN``: the teacher with N forward passes."""
        teacher = trained_role(self.out / "teacher", "teacher")
        sampler: ConfidenceSamplerConfig = replace(run.sampler, steps=steps)
        tokens = confidence_sample(teacher, self.condition, self.draws, sampler)
        images = self.tokenizer.decode(tokens)
        name = f"teacher{steps}"
        return Measured({name: self.row(images)}, {name: self.shown(images)})

    def generator(self, stage: str, run: GeneratorRun, names: Mapping[str, Decode]) -> Measured:
        """One-step images of a stage's generator, a row for each way to decode."""
        generator = trained_role(self.out / stage, "student")
        one_step: OneStepConfig = run.generator.one_step
        rows, pictures = {}, {}
        for name, decode in names.items():
            images = one_step_sample(
                generator, self.tokenizer, self.condition, self.draws, one_step, decode=decode
            )
            rows[name], pictures[name] = self.row(images), self.shown(images)
        return Measured(rows, pictures)

    def search(self, run: TestTimeRun, candidates: int, iterations: int) -> Measured:
        """One row of Best-of-N and TTEO: ``hit_rate`` of the wanted digit, by the judge, and ``fd``."""
        config = replace(run.search, candidates=candidates, iterations=iterations)
        optimizer = TestTimeEmbeddingOptimizer(
            trained_role(self.out / run.generator, "student"),
            self.tokenizer,
            digit_reward(self.out / run.reward_classifier),
            config,
        )
        number = torch.arange(run.samples)
        parity = number % CONDITIONS
        wanted = number // CONDITIONS % 5 * CONDITIONS + parity
        result = optimizer(parity, wanted, Draws.of(run.seed, 0, run.samples).fork("search"))
        with torch.no_grad():
            hits = (self.judge(result.images).argmax(1) == wanted).double().mean()
        row = {"hit_rate": float(hits), "fd": self.row(result.images, parity)["fd"]}
        # The first pictures, in the order of the wanted digits.
        order = wanted[: self.pictures].argsort(stable=True)
        return Measured(
            {search_name(candidates, iterations): row},
            {
                "wanted": wanted[order],
                "before": result.initial_images[order],
                "after": result.images[order],
            },
        )


SEARCHES = ((1, 0), (1, 4), (4, 0), (4, 4), (16, 0))


def search_name(candidates: int, iterations: int) -> str:
    """``bon4_tteo`` for four candidates and some iterations, ``tteo`` for one candidate."""
    if candidates == 1 and iterations:
        return "tteo"
    return f"bon{candidates}" + ("_tteo" if iterations else "")


# ---------------------------------------------------------------------------------------------------
# bars


def bars(rows: Rows, search: Rows) -> list[dict[str, Any]]:
    """What one run must reach: "holds" is "value" "sense" "bound"."""
    fd = {name: row["fd"] for name, row in rows.items()}
    dimo, error = rows["dimo"], {name: 1 - row["accuracy"] for name, row in rows.items()}
    hit = {name: row["hit_rate"] for name, row in search.items()}
    return [
        _at_most("reconstruction FD / floor FD", fd["recon"] / fd["floor"], 2.0),
        _at_most("teacher 16-step FD / 1-step FD", fd["teacher16"] / fd["teacher1"], 0.25),
        _at_most("one-step FD / teacher 1-step FD", fd["dimo"] / fd["teacher1"], 0.30),
        _at_most("one-step FD / teacher 4-step FD", fd["dimo"] / fd["teacher4"], 1.2),
        _at_least("one-step parity accuracy", dimo["accuracy"], 0.88),
        _at_least("one-step entropy of digits", dimo["entropy"], 2.22),
        _at_least("one-step recall", dimo["recall"], 0.88),
        _at_least("one-step coverage", dimo["coverage"], 0.70),
        _at_most("one-step soft FD / hard FD", fd["dimo_soft"] / fd["dimo"], 2.0),
        _at_most("GAN FD / its control's FD", fd["cfg2_gan"] / fd["cfg2_control"], 1.2),
        _at_most("reward parity error / before", error["reward"] / max(error["dimo"], 1e-9), 0.75),
        _at_least("TTEO hit rate", hit["tteo"], 0.50),
        _at_least("TTEO hit rate / base", hit["tteo"] / max(hit["bon1"], 1e-9), 2.0),
        _at_least("BoN 4 + TTEO hit rate - BoN 4", hit["bon4_tteo"] - hit["bon4"], 0.15),
    ]


def stretch(rows: Rows) -> dict[str, Any]:
    """Beyond the paper: one step against the teacher's sixteen. Reported, not required."""
    return _at_most(
        "one-step FD / teacher 16-step FD", rows["dimo"]["fd"] / rows["teacher16"]["fd"], 1.0
    )


def bars_over_seeds(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the mean over several seeds must reach."""
    ratios = [m["rows"]["cfg2_gan"]["fd"] / m["rows"]["cfg2_control"]["fd"] for m in runs]
    return [
        _at_most(f"GAN FD / its control's FD, mean of {len(runs)}", sum(ratios) / len(ratios), 0.9)
    ]


def _at_most(name: str, value: float, bound: float) -> dict[str, Any]:
    return {
        "name": name, "value": value, "sense": "<=", "bound": bound, "holds": value <= bound
    }  # fmt: skip


def _at_least(name: str, value: float, bound: float) -> dict[str, Any]:
    return {
        "name": name, "value": value, "sense": ">=", "bound": bound, "holds": value >= bound
    }  # fmt: skip
