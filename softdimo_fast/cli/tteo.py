"""``softdimo tteo``: test-time embedding optimisation of a trained generator."""

from __future__ import annotations

import json
from pathlib import Path

from softdimo_fast.cli.arguments import Changes, ConfigFile, RecipeName, Seed
from softdimo_fast.cli.errors import require_folder
from softdimo_fast.cli.train import load_settings


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
        runs: the folder with the runs that the configuration names: generator, tokenizer, classifier.
        out: the folder for tteo.png and tteo.json.
        seed: of the generator's inputs.
        config: a JSON file with the whole configuration, in place of the recipe's.
        set: settings to change, as search.candidates=4 search.iterations=2 samples=100.
    """
    import torch

    from softdimo_fast._files import write_atomically
    from softdimo_fast.diffusion import Draws
    from softdimo_fast.recipes.build import digit_reward, trained_role
    from softdimo_fast.report.grid import comparison_grid, png_bytes
    from softdimo_fast.trainers import Stopped, TestTimeEmbeddingOptimizer
    from softdimo_fast.trainers.stopping import StopRequest

    settings = load_settings(recipe_name, "tteo", seed, config, set)
    optimizer = TestTimeEmbeddingOptimizer(
        trained_role(runs / settings.generator, "student"),
        trained_role(runs / settings.tokenizer, "tokenizer"),
        digit_reward(runs / settings.reward_classifier),
        settings.search,
    )
    wanted = torch.arange(settings.samples) % 10
    draws = Draws.of(settings.seed, 0, settings.samples).fork("search")
    require_folder("--out", out)
    with StopRequest() as stop:
        try:
            found = optimizer(wanted % 2, wanted, draws, stop=lambda: stop.requested)
        except InterruptedError as interrupted:
            raise Stopped(f"{interrupted}; nothing was written") from interrupted
    shown = min(20, settings.samples)
    grid = comparison_grid(
        [("before", found.initial_images[:shown]), ("after", found.images[:shown])],
        notes={"after": [str(int(digit)) for digit in wanted[:shown]]},
    )
    write_atomically(out / "tteo.png", png_bytes(grid))
    document = {
        "wanted": wanted.tolist(),
        "reward_before": found.initial_reward.tolist(),
        "reward_after": found.reward.tolist(),
    }
    write_atomically(out / "tteo.json", json.dumps(document).encode())
    before, after = float(found.initial_reward.mean()), float(found.reward.mean())
    print(f"mean reward {before:.3f} -> {after:.3f} over {settings.samples} samples, in {out}")
    return 0
