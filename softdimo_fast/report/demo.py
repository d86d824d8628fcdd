"""The files that a finished demo leaves: ``metrics.json``, ``grid.png`` and ``report.html``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from softdimo_fast._files import write_atomically
from softdimo_fast._version import __version__
from softdimo_fast.recipes.evaluation import bars, stretch
from softdimo_fast.recipes.stages import Stage, StageResult
from softdimo_fast.report.contents import PictureRow, ReportData, SearchPairs
from softdimo_fast.report.grid import comparison_grid, png_bytes
from softdimo_fast.report.page import write_report
from softdimo_fast.trainers.run_log import RunLog

PICTURE = ("real", "recon", "teacher1", "teacher4", "teacher16", "dimo", "cfg2_gan", "reward")
PICTURE_NOTE = (
    "In each row but the search's the left half was asked for even digits, the right for odd ones."
)
QUICK_NOTE = "A quick run: a few steps of every training, so the images are not good. "


def versions() -> dict[str, str]:
    """What computed the numbers."""
    import platform

    return {
        "softdimo_fast": __version__,
        "torch": str(torch.__version__),
        "Python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads visible to torch",
    }


def demo_metrics(
    seed: int, seconds: float, results: Mapping[str, StageResult], *, quick: bool, command: str
) -> dict[str, Any]:
    """The content of ``metrics.json``."""
    rows = {
        name: row
        for result in results.values()
        for name, row in result.values.get("rows", {}).items()
    }
    search = results["search"].values["search"]
    return {
        "seed": seed,
        "quick": quick,
        "command": command,
        "seconds": seconds,
        "stage_seconds": {name: result.seconds for name, result in results.items()},
        "judge_accuracy": results["judge"].values["held_out_accuracy"],
        "rows": rows,
        "search": search,
        "bars": bars(rows, search),
        "stretch": stretch(rows),
        "versions": versions(),
    }


def write_demo(
    out: Path,
    stages: Sequence[Stage],
    results: Mapping[str, StageResult],
    metrics: Mapping[str, Any],
) -> None:
    """Writes the three files; the metrics come last, as they say that the demo is finished."""
    images = {name: shown for r in results.values() for name, shown in r.images.items()}
    rows = [PictureRow.of(name, images[name]) for name in PICTURE]
    wanted = [int(digit) for digit in images["wanted"]]
    pairs = SearchPairs(wanted, images["before"], images["after"])
    grid = comparison_grid(
        [
            *((row.label, row.images) for row in rows),
            ("TTEO, before", pairs.before),
            ("TTEO, after", pairs.after),
        ],
        notes={"TTEO, after": [str(digit) for digit in wanted]},
    )
    write_atomically(out / "grid.png", png_bytes(grid))
    titles = {stage.name: stage.title for stage in stages}
    data = ReportData(
        title="Soft-Di[M]O on handwritten digits",
        rows=rows,
        metrics=_readable(metrics),
        pairs=pairs,
        picture_note=(QUICK_NOTE if metrics["quick"] else "") + PICTURE_NOTE,
        logs={titles[name]: RunLog.read(out / name) for name in titles if _has_log(out / name)},
        stage_seconds={titles[name]: result.seconds for name, result in results.items()},
        versions=metrics["versions"],
        configs={stage.title: _listing(stage.config) for stage in stages},
        command=metrics["command"],
    )
    write_report(out, data)
    write_atomically(out / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())


def _has_log(folder: Path) -> bool:
    return (folder / "log.jsonl").exists()


def _readable(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """With the bars' bounds as texts that say their direction."""
    shown = [{**bar, "bound": f"{bar['sense']} {bar['bound']:g}"} for bar in metrics["bars"]]
    return {**metrics, "bars": shown}


def _listing(config: Mapping[str, Any]) -> str:
    """``name = value`` lines."""
    return "\n".join(_lines(config["run"], ""))


def _lines(group: Mapping[str, Any], prefix: str) -> list[str]:
    lines = []
    for name, value in group.items():
        if isinstance(value, Mapping):
            lines += _lines(value, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name} = {json.dumps(value)}")
    return lines
