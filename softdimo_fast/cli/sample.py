"""``softdimo sample``: images from a trained run, as one picture and as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from softdimo_fast import _config
from softdimo_fast.cli.arguments import Changes, ModelSource, RunFolder
from softdimo_fast.cli.errors import UsageError, require_folder

RECIPES_OWN = "(default: the recipe's)"
Steps = Annotated[int | None, arg(metavar="INT", help_behavior_hint=RECIPES_OWN)]
Temperature = Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint=RECIPES_OWN)]
Device = Annotated[str | None, arg(metavar="STR", help_behavior_hint="(default: cpu)")]
BatchSize = Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 16)")]
Prompts = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="(default: the run's)")]


def run(
    run_folder: RunFolder,
    out: Path = Path("samples.png"),
    count: int = 64,
    condition: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: all classes in turn)")
    ] = None,
    seed: int = 0,
    decode: Annotated[
        Literal["sample", "argmax", "soft"] | None,
        arg(metavar="{sample,argmax,soft}", help_behavior_hint="(default: sample)"),
    ] = None,
    steps: Steps = None,
    temperature: Temperature = None,
    tokenizer: ModelSource = None,
    prompts: Prompts = None,
    text_encoder: ModelSource = None,
    one_step: bool = False,
    device: Device = None,
    batch_size: BatchSize = None,
    set: Changes = (),  # the option's name, and nothing here needs the builtin
) -> int:
    """Samples a trained generator in one step, or a teacher in several.

    A published teacher runs through the sampler that it was published with.

    Args:
        run_folder: of a finished distillation, adversarial or reward run, or of a teacher; or a published
            model: a file, a folder or a hub id owner/name[/path].
        out: a .png, or a .safetensors with the images [count, channels, height, width] in [-1, 1].
        count: how many images.
        condition: the class (or prompt, from 0) of all images.
        seed: of the images: the same seed gives the same images.
        decode: a generator's tokens sampled, the likeliest ones, or the soft embedding.
        steps: of a teacher's sampler.
        temperature: of the tokens' softmax.
        tokenizer: of a published model: a file, a folder or a hub id.
        prompts: of a text-to-image model: a file, one prompt a line.
        text_encoder: of a text-to-image model: a folder.
        one_step: the published model is a one-step generator.
        device: for published models.
        batch_size: for published models: images at a time.
        set: further settings of the sampler, as initial_ratio=0.7 or confidence_temperature=2.
    """
    from softdimo_fast._files import write_atomically

    _config.require_range("", "--count", count, minimum=1)
    encode = _encoder(out)
    require_folder("--out: its parent", out.parent)
    changes = list(set)
    changes += [f"temperature={temperature}"] if temperature is not None else []
    published = _Published(tokenizer, prompts, text_encoder, one_step, device, batch_size)
    if published.are_meant(run_folder):
        images = published.images(run_folder, count, condition, seed, decode, steps, changes)
    else:
        published.refuse(run_folder)
        images = _images(run_folder, count, condition, seed, decode, steps, changes)
    write_atomically(out, encode(images))
    print(f"{count} images in {out}")
    return 0


@dataclass(frozen=True)
class _Published:
    """The options that published models take."""

    tokenizer: str | None
    prompts: Path | None
    text_encoder: str | None
    one_step: bool
    device: str | None
    batch_size: int | None

    def are_meant(self, source: Path) -> bool:
        """Whether ``source`` is a published model, or a run on one.

        Raises:
            UsageError: it is no run, and nothing says that it is a model.
        """
        from softdimo_fast.recipes.build import finished_run
        from softdimo_fast.recipes.published_runs import PublishedGeneratorRun
        from softdimo_fast.trainers import checkpoint

        if checkpoint.find(source / "checkpoints"):
            return isinstance(finished_run(source), PublishedGeneratorRun)
        if self.tokenizer is None and not _holds_weights(source):
            raise UsageError(
                f"{source} holds no trained run (no checkpoint was found); of a published model, "
                "--tokenizer must be given: a file, a folder or a hub id"
            )
        return True

    def refuse(self, folder: Path) -> None:
        """Where they are given for a run that has its own."""
        options = {
            "--tokenizer": self.tokenizer, "--prompts": self.prompts,
            "--text-encoder": self.text_encoder, "--one-step": self.one_step or None,
            "--device": self.device, "--batch-size": self.batch_size,
        }  # fmt: skip
        for name, value in options.items():
            if value is not None:
                raise UsageError(f"{name} is for published models; {folder} holds a run of digits")

    def images(
        self, source: Path, count: int, condition: int | None, seed: int, decode: Any,
        steps: int | None, changes: list[str],
    ) -> Any:  # fmt: skip
        from softdimo_fast.diffusion import OneStepConfig
        from softdimo_fast.recipes.published_samples import ImageMaker

        batch_size = 16 if self.batch_size is None else self.batch_size
        _config.require_range("", "--batch-size", batch_size, minimum=1)
        maker = ImageMaker.of(
            source, tokenizer=self.tokenizer, one_step=self.one_step, prompts=self.prompts,
            text_encoder=self.text_encoder, device=self.device or "cpu",
        )  # fmt: skip
        if isinstance(maker.sampler, OneStepConfig):
            if steps not in (None, 1):
                raise UsageError(f"--steps is a teacher's: a generator makes one, got {steps}")
        elif decode is not None:
            raise UsageError(f"--decode is a generator's: a teacher samples, got {decode}")
        elif steps is not None:
            changes = [*changes, f"steps={steps}"]
        maker = maker.with_settings(changes)
        numbers = maker.numbers(count, condition)
        return maker.images(numbers, seed=seed, decode=decode or "sample", batch_size=batch_size)


def _holds_weights(source: Path) -> bool:
    from softdimo_fast.models.files import WEIGHT_FILES

    return source.is_file() or any(any(source.glob(pattern)) for pattern in WEIGHT_FILES)


def _encoder(out: Path) -> Any:
    """How images become the file's bytes; refuses other endings before any work."""
    if out.suffix == ".png":
        from softdimo_fast.report.grid import image_grid, png_bytes

        return lambda images: png_bytes(image_grid(images, columns=16, scale=4))
    if out.suffix == ".safetensors":
        from safetensors.torch import save

        return lambda images: save({"images": images.clamp(-1, 1).contiguous()})
    raise UsageError(f"--out must end in .png or .safetensors, got {out}")


def _images(
    folder: Path, count: int, condition: int | None, seed: int, decode: Any, steps: int | None,
    changes: list[str],
) -> Any:  # fmt: skip
    import torch

    from softdimo_fast.diffusion import Draws, confidence_sample, one_step_sample
    from softdimo_fast.recipes.build import beside, finished_run, trained_role
    from softdimo_fast.recipes.runs import GeneratorRun, TeacherRun

    settings = finished_run(folder)
    if not isinstance(settings, GeneratorRun | TeacherRun):
        raise UsageError(f"{folder} holds a {type(settings).__name__}, which makes no images")
    tokenizer = trained_role(beside(folder, settings.tokenizer), "tokenizer")
    draws = Draws.of(seed, 0, count).fork("sample")
    if isinstance(settings, TeacherRun):
        if decode is not None:
            raise UsageError(
                f"--decode is a generator's: the teacher in {folder} samples its tokens, got {decode}"
            )
        if steps is not None:
            changes = [*changes, f"steps={steps}"]
        model = trained_role(folder, "teacher")
        sampler = _config.override(settings.sampler, changes)
        classes = _classes(model, count, condition)
        with torch.no_grad():
            return tokenizer.decode(confidence_sample(model, classes, draws, sampler))
    if steps not in (None, 1):
        raise UsageError(
            f"--steps is a teacher's: the generator in {folder} makes one, got {steps}"
        )
    model = trained_role(folder, "student")
    one_step = _config.override(settings.generator.one_step, changes)
    classes = _classes(model, count, condition)
    return one_step_sample(model, tokenizer, classes, draws, one_step, decode=decode or "sample")


def _classes(model: Any, count: int, condition: int | None) -> Any:
    import torch

    classes = model.config.conditions
    if condition is None:
        return torch.arange(count) % classes
    _config.require_range("", "--condition", condition, minimum=0, maximum=classes - 1)
    return torch.full((count,), condition)
