"""``softdimo export``: published checkpoints to our folders, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from softdimo_fast.cli.errors import UsageError


def run(
    source: tyro.conf.Positional[str],
    out: Path,
    family: str | None = None,
    sizes: Annotated[str | None, tyro.conf.arg(metavar="JSON")] = None,
    revision: str | None = None,
    published: bool = False,
) -> int:
    """Converts a model: to a folder of safetensors and JSON, or (--published) to the published form.

    Args:
        source: a published file or folder, a folder of ours, a finished run, or a hub id owner/name, or
            owner/name/path for a folder or file in the repository.
        out: the folder to make; with --published the file, ending in .safetensors, .pth, .bin or .ckpt.
        family: of a published file, if its keys should not tell.
        sizes: of a published file, as JSON with the published constructor's names, if they are not the
            published model's.
        revision: of a hub repository: a commit.
        published: write the form of the published checkpoints; a .safetensors of a family that is published
            with its sizes in a config.json gets one beside it, if there is none yet.
    """
    from softdimo_fast.models import describe, save_pretrained, save_published
    from softdimo_fast.models.files import read_pretrained

    try:
        given = None if sizes is None else json.loads(sizes)
    except ValueError as error:
        raise UsageError(f"--sizes must be JSON, got {sizes!r}: {error}") from error
    if (Path(source) / "checkpoints").is_dir():
        model, read = _of_run(Path(source)), None
    else:
        model, read = read_pretrained(source, family=family, sizes=given, revision=revision)
    if published:
        save_published(model, out)
    else:
        save_pretrained(model, out, source=read)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{describe(model)['family']}, {count / 1e6:.1f} million parameters, in {out}")
    return 0


def _of_run(folder: Path) -> Any:
    """What a finished run was for: its generator, teacher, tokenizer or classifier."""
    from softdimo_fast.recipes.build import finished_run, trained_role
    from softdimo_fast.recipes.published_runs import PublishedGeneratorRun
    from softdimo_fast.recipes.runs import ClassifierRun, GeneratorRun, TeacherRun, TokenizerRun

    roles = {
        GeneratorRun: "student",
        PublishedGeneratorRun: "student",
        TeacherRun: "teacher",
        TokenizerRun: "tokenizer",
        ClassifierRun: "classifier",
    }
    return trained_role(folder, roles[type(finished_run(folder))])
