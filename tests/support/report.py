"""A made-up run whose report has everything that a real one has."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from softdimo_fast.report.contents import PictureRow, ReportData, SearchPairs

# Text that must never be understood as HTML.
HOSTILE = "<script>alert('no')</script> & \"quotes\""
FD = {
    "floor": 0.84, "recon": 0.99, "teacher1": 40.11, "teacher2": 16.53, "teacher4": 6.34, "teacher8": 4.07,
    "teacher16": 3.66, "dimo": 5.08, "dimo_argmax": 5.03, "dimo_soft": 6.41, "cfg2_control": 8.87,
    "cfg2_gan": 5.7, "reward": 5.84,
}  # fmt: skip
STAGES = {
    "classifiers": 6.4,
    "tokenizer": 41.0,
    "teacher": 148.2,
    "distillation": 71.9,
    "guided_control": 30.3,
    "adversarial": 52.8,
    "reward": 24.6,
    "search": 5.1,
    "evaluation": 22.7,
}


def digit_images(digits: Tensor, noise: float, seed: int = 0) -> Tensor:
    """float32 ``[N, 1, 8, 8]`` in [-1, 1]: a font's digits with some noise."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(44)
    glyphs = []
    for digit in range(10):
        glyph = Image.new("L", (48, 48))
        ImageDraw.Draw(glyph).text((24, 24), str(digit), fill=255, font=font, anchor="mm")
        pixels = torch.tensor(list(glyph.resize((8, 8)).tobytes()), dtype=torch.float32)
        glyphs.append(pixels.reshape(1, 8, 8) / 127.5 - 1)
    clean = torch.stack(glyphs)[digits]
    generator = torch.Generator().manual_seed(seed)
    return (clean + noise * torch.randn(clean.shape, generator=generator)).clamp(-1, 1)


def metrics() -> dict[str, Any]:
    """What ``metrics.json`` would hold; one bar is missed, and one number is not there."""
    rows: dict[str, dict[str, float | None]] = {}
    for name, fd in FD.items():
        rows[name] = {
            "fd": fd,
            "accuracy": max(0.78, 1 - fd / 80),
            "precision": max(0.68, 0.98 - fd / 40),
            "recall": 0.96,
            "coverage": max(0.3, 0.98 - fd / 30),
            "entropy": 2.29,
            "n": 2000,
        }
    rows["dimo_argmax"]["recall"] = math.nan
    search = {"bon1": (0.19, 6.76), "tteo": (0.71, 6.96), "bon4": (0.55, 7.45)}
    search |= {"bon4_tteo": (0.90, 6.24), "bon16": (0.94, 4.83)}
    bars: list[dict[str, Any]] = [
        {"name": "reconstruction FD / floor FD", "value": 1.18, "bound": 2.0, "holds": True},
        {"name": "teacher 16-step FD / 1-step FD", "value": 0.0913, "bound": 0.25, "holds": True},
        {"name": "one-step FD / teacher 1-step FD", "value": 0.1267, "bound": 0.3, "holds": True},
        {"name": "one-step FD / teacher 4-step FD", "value": 0.8013, "bound": 1.2, "holds": True},
        {"name": "parity accuracy, one step", "value": 0.9205, "bound": 0.88, "holds": True},
        {"name": "entropy of predicted digits", "value": 2.2914, "bound": 2.22, "holds": True},
        {"name": "recall, one step", "value": 0.961, "bound": 0.88, "holds": True},
        {"name": "coverage, one step", "value": 0.6834, "bound": 0.7, "holds": False},
        {"name": "GAN FD / control FD", "value": 0.6426, "bound": "<= 1.2", "holds": True},
        {
            "name": "TTEO hit rate - base hit rate >= base",
            "value": 0.52,
            "bound": 0.19,
            "holds": True,
        },
    ]
    return {
        "seed": 0,
        "seconds": 291.7,
        "rows": rows,
        "search": {name: {"hit_rate": hit, "fd": fd} for name, (hit, fd) in search.items()},
        "bars": bars,
    }


def log(steps: int, every: int, keys: dict[str, tuple[float, float]]) -> list[dict[str, float]]:
    """Records of a log: each key falls from the first number to the second, with some noise."""
    generator = torch.Generator().manual_seed(steps)
    records: list[dict[str, float]] = []
    for step in range(0, steps, every):
        record: dict[str, float] = {"step": step, "seconds": step * 0.05, "lr": 3e-4}
        for key, (start, end) in keys.items():
            noise = 1 + 0.08 * float(torch.randn((), generator=generator))
            record[key] = (end + (start - end) * math.exp(-6 * step / steps)) * noise
        records.append(record)
    return records


def report_data() -> ReportData:
    """A report of every part."""
    digits = torch.tensor([0, 2, 4, 6, 8, 0, 2, 4, 1, 3, 5, 7, 9, 1, 3, 5])
    noises = {"real": 0.1, "recon": 0.12, "teacher1": 0.7, "teacher4": 0.35, "teacher16": 0.15}
    noises |= {"dimo": 0.3, "cfg2_gan": 0.25, "reward": 0.2}
    rows = [PictureRow.of(key, digit_images(digits, noise)) for key, noise in noises.items()]
    rows.append(PictureRow(HOSTILE, HOSTILE, digit_images(digits[:5], 0.2)))
    wanted = [0, 2, 4, 6, 8, 0, 2, 4, 1, 3, 5, 7, 9, 1, 3, 5]
    before = digit_images(torch.tensor(wanted).flip(0), 0.4)
    logs: dict[str, list[dict[str, float]]] = {
        "tokenizer": log(1500, 10, {"loss": (0.9, 0.014), "perplexity": (12, 57)}),
        "teacher": log(3000, 10, {"loss": (4.16, 2.97), "grad_norm": (6, 0.8)}),
        "distillation": log(
            800,
            5,
            {
                "generator_loss": (0.8, 0.02),
                "auxiliary_loss": (3.4, 2.9),
                "divergence": (0.6, 0.1),
                "token_entropy": (3.2, 1.4),
                "grad_norm": (900, 1.1),
            },
        ),
        "reward": log(150, 5, {"reward_loss": (0.5, 0.1), "discriminator_loss": (1.5, 1.2)}),
        "nothing": [],
    }
    logs["reward"][3]["reward_loss"] = math.nan
    config = {"learning_rate": 3e-4, "batch": 64, "note": HOSTILE, "long": "x" * 300}
    return ReportData(
        title="Soft-Di[M]O on handwritten digits",
        rows=rows,
        metrics=metrics(),
        pairs=SearchPairs(wanted, before, digit_images(torch.tensor(wanted), 0.3)),
        picture_note="The first eight images of a row were asked for even digits, the others for odd ones.",
        logs=logs,
        stage_seconds=STAGES,
        versions={
            "softdimo_fast": "0.1.0",
            "torch": "2.13.0+cpu",
            "Python": "3.11.9",
            "processor": "An Imaginary Processor with a Long Name, 2 cores at 2.4 GHz",
        },
        configs={name: json.dumps(config, indent=2) for name in ("tokenizer", "teacher")},
        command="softdimo demo --seed 0 --out runs/demo",
    )
