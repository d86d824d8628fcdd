"""``softdimo tteo``: test-time embedding optimisation of a trained generator."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softdimo_fast.cli.arguments import Changes, ConfigFile, RecipeName, Seed
from softdimo_fast.cli.errors import require_folder
from softdimo_fast.cli.train import load_settings

if TYPE_CHECKING:
    from torch import Tensor

    from softdimo_fast.trainers import TestTimeResult


def run(
    recipe_name: RecipeName,
    runs: Path = Path("runs/demo"),
    out: Path = Path("tteo"),
    seed: Seed = None,
    config: ConfigFile = None,
    set: Changes = (),  # the option's name, and nothing here needs the builtin
) -> int:
    """Searches generator inputs for images of every wanted class; changes no weight.

    Writes a picture (before above after) and the rewards of each sample.

    Args:
        recipe_name: digits, maskgit, maskbit, maskgen_l, maskgen_xl or meissonic.
        runs: of digits: the folder with the runs that the configuration names: generator, tokenizer,
            classifier. The other recipes take paths: --set generator=RUN tokenizer=PATH.
        out: the folder for tteo.png and tteo.json.
        seed: of the generator's inputs.
        config: a JSON file with the whole configuration, in place of the recipe's.
        set: settings to change, as search.candidates=4 search.iterations=2 samples=100.
    """
    from softdimo_fast.recipes.published_runs import PublishedTestTimeRun

    settings = load_settings(recipe_name, "tteo", seed, config, set)
    published = isinstance(settings, PublishedTestTimeRun)
    search = _published_search if published else partial(_digits_search, runs)
    found, wanted = search(settings, out)
    _write(out, found, wanted)
    before, after = float(found.initial_reward.mean()), float(found.reward.mean())
    print(f"mean reward {before:.3f} -> {after:.3f} over {settings.samples} samples, in {out}")
    return 0


def _digits_search(runs: Path, settings: Any, out: Path) -> tuple[TestTimeResult, Tensor]:
    """What was found, and the digit that each sample should show."""
    import torch

    from softdimo_fast.diffusion import Draws
    from softdimo_fast.recipes.build import digit_reward, trained_role
    from softdimo_fast.trainers import TestTimeEmbeddingOptimizer

    optimizer = TestTimeEmbeddingOptimizer(
        trained_role(runs / settings.generator, "student"),
        trained_role(runs / settings.tokenizer, "tokenizer"),
        digit_reward(runs / settings.reward_classifier),
        settings.search,
    )
    wanted = torch.arange(settings.samples) % 10
    draws = Draws.of(settings.seed, 0, settings.samples).fork("search")
    require_folder("--out", out)
    with _stoppable() as stop:
        return optimizer(wanted % 2, wanted, draws, stop=stop), wanted


def _published_search(settings: Any, out: Path) -> tuple[TestTimeResult, Tensor]:
    """What was found, and the class or prompt of each sample, by number."""
    from softdimo_fast.recipes.published_samples import search

    with _stoppable() as stop:
        return search(settings, ready=partial(require_folder, "--out", out), stop=stop)


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    from softdimo_fast.trainers import Stopped
    from softdimo_fast.trainers.stopping import StopRequest

    with StopRequest() as request:
        try:
            yield lambda: request.requested
        except InterruptedError as interrupted:
            raise Stopped(f"{interrupted}; nothing was written") from interrupted


def _write(out: Path, found: TestTimeResult, wanted: Tensor) -> None:
    from softdimo_fast._files import write_atomically
    from softdimo_fast.report.grid import comparison_grid, png_bytes

    shown = min(20, len(wanted))
    grid = comparison_grid(
        [("before", found.initial_images[:shown].cpu()), ("after", found.images[:shown].cpu())],
        notes={"after": [str(int(number)) for number in wanted[:shown]]},
    )
    write_atomically(out / "tteo.png", png_bytes(grid))
    document = {
        "wanted": wanted.tolist(),
        "reward_before": found.initial_reward.tolist(),
        "reward_after": found.reward.tolist(),
    }
    write_atomically(out / "tteo.json", json.dumps(document).encode())
