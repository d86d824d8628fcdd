"""What published runs refuse, before any work: what is missing, what is not there, what does not fit."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.published_runs import (
    FAMILY,
    RECIPES,
    TOKENIZER,
    Files,
    brightness,
    tiny_model,
    tiny_run,
    write_files,
)

from softdimo_fast import _config
from softdimo_fast._config import ConfigError
from softdimo_fast.data.token_file import TokenFileError, TokenFileWriter
from softdimo_fast.models import ModelFileError, save_pretrained
from softdimo_fast.recipes import recipe
from softdimo_fast.recipes.build import MissingRunError
from softdimo_fast.recipes.published_build import build_published_trainer
from softdimo_fast.recipes.published_samples import ImageMaker, search
from softdimo_fast.trainers import CheckpointError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    families = dict.fromkeys(FAMILY.values())
    return {family: write_files(tmp_path_factory.mktemp(family), family) for family in families}


@pytest.fixture
def files(written: dict[str, Files], tmp_path: Path) -> Callable[[str], Files]:
    """A family's files, to be spoilt."""

    def copied(family: str) -> Files:
        shutil.copytree(written[family].root, tmp_path / "files", dirs_exist_ok=True)
        return Files(tmp_path / "files", family)

    return copied


def refused(
    error: type[Exception], words: str, name: str, method: str, ours: Files, *changes: str
) -> None:
    """The error's message holds ``words``, and nothing was written."""
    folder = ours.root.parent / "run"
    run = tiny_run(name, method, ours, *changes)
    with pytest.raises(error, match=re.escape(words)):
        build_published_trainer(run, folder, encoder=ours.encoder, reward=brightness)
    assert not folder.exists()


# ---- what a config refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method", "changes", "words"),
    [
        ("maskgit", "distillation", ["distillation=none"], "distillation: must be set where"),
        ("maskgit", "reward", ["rewards=none"], "rewards: must be set where reward is"),
        ("maskgit", "distillation", ["rewards.clip.path=x"], "rewards: must be set where reward is"),
        ("maskgit", "distillation", ["bits=14"], "bits: must be a number for maskbit, and None"),
        ("maskbit", "distillation", ["bits=none"], "bits: must be a number for maskbit"),
        ("maskbit", "distillation", ["bits=13"], "bits: must be an even number >= 2, got 13"),
        ("maskgit", "distillation", ["family=maskgen"], "family: must be"),
        ("maskgit", "distillation", ["timestep=mask_ratio"], "timestep: must be 'condition': only"),
        ("maskgit", "tteo", ["timestep=mask_ratio"], "timestep: must be 'condition': only"),
        ("maskbit", "adversarial_longer", ["student=x"], "student: must be None where start is set"),
        (
            "meissonic", "adversarial", ["adversarial.heads.class_projection=true"],
            "adversarial.heads.class_projection: must be false where the condition is a text",
        ),
        (
            "maskgen_l", "distillation", ["text.negative_prompt=ugly"],
            "text.negative_prompt: must be '' for maskgen_vq, got 'ugly'",
        ),
        ("maskgit", "tteo", ["samples=0"], "samples: must be a number >= 1"),
        ("maskgit", "reward", ["rewards.clip.weight=inf"], "rewards.clip.weight"),
        (
            "maskgit", "reward", ["rewards.clip=none", "rewards.image_reward=none"],
            "rewards.clip: must be set where all other rewards are None",
        ),
        ("maskgit", "distillation", ["techer=x"], "did you mean 'teacher'?"),
    ],
)  # fmt: skip
def test_configs(name: str, method: str, changes: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        _config.override(recipe(name, method), changes)


# ---- what is not given -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_everything_that_is_not_given_is_named_at_once(name: str, tmp_path: Path) -> None:
    run = recipe(name, "adversarial")
    said = r"teacher: must be given: the teacher's weights, as --set teacher=PATH \(also missing: "
    with pytest.raises(ConfigError, match=said + ".*real_tokens"):
        build_published_trainer(run, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "method", "setting", "words"),
    [
        ("maskgit", "distillation", "teacher", "the teacher's weights"),
        ("maskgit", "reward", "tokenizer", "the tokenizer's weights"),
        ("maskbit", "adversarial", "real_tokens", "a file of encoded images"),
        ("maskgit", "reward", "text.prompts", "a file of prompts, one a class"),
        ("maskgen_l", "distillation", "text.prompts", "a file of prompts"),
    ],
)
def test_one_thing_that_is_not_given(
    name: str, method: str, setting: str, words: str, files: Callable[[str], Files]
) -> None:
    said = f"{setting}: must be given: {words}, as --set {setting}=PATH, got None"
    refused(ConfigError, said, name, method, files(FAMILY[name]), f"{setting}=none")


def test_encoders_and_rewards_are_needed_where_none_is_handed_in(
    files: Callable[[str], Files], tmp_path: Path
) -> None:
    ours = files("maskgen_vq")
    with pytest.raises(ConfigError, match=r"text\.encoder: must be given: the folder of the text"):
        build_published_trainer(tiny_run("maskgen_l", "distillation", ours), tmp_path / "run")
    run = tiny_run("maskgen_l", "reward", ours)
    with pytest.raises(ConfigError, match=r"rewards\.clip\.path: must be given: the weights of"):
        build_published_trainer(run, tmp_path / "run", encoder=ours.encoder)


# ---- what is not there -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ("distillation", "teacher"), ("reward", "tokenizer"), ("distillation", "student"),
        ("adversarial", "real_tokens"), ("reward", "text.prompts"),
    ],
)  # fmt: skip
def test_paths_that_lead_nowhere(
    method: str, setting: str, files: Callable[[str], Files], tmp_path: Path
) -> None:
    path = tmp_path / "nowhere"
    said = f"{setting}: must be a file"
    refused(ConfigError, said, "maskgit", method, files("maskgit"), f"{setting}={path}")


def test_a_start_that_is_not_there(files: Callable[[str], Files]) -> None:
    words = "holds no trained run"
    refused(MissingRunError, words, "maskbit", "adversarial", files("maskbit"), "start=nowhere")


def test_a_start_that_is_not_finished(files: Callable[[str], Files], tmp_path: Path) -> None:
    ours = files("maskgit")
    run = tiny_run("maskgit", "distillation", ours)
    trainer = build_published_trainer(run, tmp_path / "first")
    trainer.train_step()
    trainer.save()
    words = "stands at step 1 of 2: finish it first"
    refused(MissingRunError, words, "maskgit", "distillation", ours, "start=first")


def test_a_device_that_is_not_there(files: Callable[[str], Files]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    words = "trainer.device: must be a device of this machine"
    ours = files("maskgit")
    refused(ConfigError, words, "maskgit", "distillation", ours, "trainer.device=cuda")


# ---- what does not fit -------------------------------------------------------------------------------------


def test_a_teacher_of_another_family(files: Callable[[str], Files], written: Any) -> None:
    ours = files("maskgit")
    other = written["maskbit"].root / "teacher"
    words = "teacher: must be of the family maskgit, got 'maskbit'"
    refused(ConfigError, words, "maskgit", "distillation", ours, f"teacher={other}")
    words = "teacher: must be of the family maskgit, got 'maskgit_vqgan'"
    tokenizer = ours.root / "tokenizer"
    refused(ConfigError, words, "maskgit", "distillation", ours, f"teacher={tokenizer}")


def test_a_teacher_of_other_bits(files: Callable[[str], Files]) -> None:
    words = "teacher: must be of bits = 14, got '8 bits'"
    refused(ConfigError, words, "maskbit", "distillation", files("maskbit"), "bits=14")


def test_a_tokenizer_of_another_family(files: Callable[[str], Files], written: Any) -> None:
    other = written["meissonic"].root / "tokenizer"
    words = "tokenizer: must be of the family tatitok_vq, got 'meissonic_vqvae'"
    refused(ConfigError, words, "maskgen_l", "reward", files("maskgen_vq"), f"tokenizer={other}")


@pytest.mark.parametrize(
    ("name", "sizes", "shown"),
    [
        ("maskgit", {"n_embed": 30}, "30 codes in the shape [4]"),
        ("maskbit", {"img_size": 8}, "16 codes in the shape [16, 2]"),
        ("meissonic", {"token_grid": [2, 2]}, "20 codes in the shape [4]"),
        ("meissonic", {"num_vq_embeddings": 24}, "24 codes in the shape [16]"),
    ],
)
def test_a_tokenizer_with_other_tokens(
    name: str, sizes: dict[str, Any], shown: str, files: Callable[[str], Files], tmp_path: Path
) -> None:
    """Whether a method needs the tokenizer or not."""
    family = FAMILY[name]
    save_pretrained(tiny_model(TOKENIZER[family], **sizes), tmp_path / "other")
    ours = files(family)
    for method in ("distillation", "reward"):
        change = f"tokenizer={tmp_path / 'other'}"
        refused(ConfigError, "tokenizer: must be of", name, method, ours, change)
        refused(ConfigError, f"got '{shown}'", name, method, ours, change)


def test_a_student_of_other_sizes(files: Callable[[str], Files], tmp_path: Path) -> None:
    save_pretrained(tiny_model("maskgit", depth=2), tmp_path / "student")
    words = "student: must be a generator of the teacher's sizes, got 'depth: 1 -> 2'"
    change = f"student={tmp_path / 'student'}"
    refused(ConfigError, words, "maskgit", "distillation", files("maskgit"), change)


def test_a_start_of_other_sizes(files: Callable[[str], Files], tmp_path: Path) -> None:
    ours = files("maskgit")
    build_published_trainer(tiny_run("maskgit", "distillation", ours), tmp_path / "first").run()
    save_pretrained(tiny_model("maskgit", hidden_dim=8), tmp_path / "other")
    words = "start: must be a generator of the teacher's sizes, got 'hidden_dim: 16 -> 8'"
    words = words.replace("16 -> 8", "8 -> 16")
    changes = (f"teacher={tmp_path / 'other'}", "start=first")
    refused(ConfigError, words, "maskgit", "distillation", ours, *changes)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"vocabulary": 19}, "got '19 codes in the shape [4]'"),
        ({"token_shape": (5,)}, "got '20 codes in the shape [5]'"),
        (
            {"classes": 2},
            "real_tokens: must be of images of the teacher's 3 classes, got '2 classes'",
        ),
        ({"images": 0}, "real_tokens: must be of at least one image, got '0 images'"),
    ],
)
def test_real_tokens_of_another_kind(
    sizes: dict[str, Any], words: str, files: Callable[[str], Files]
) -> None:
    ours = files("maskgit")
    options = {"vocabulary": 20, "token_shape": (4,), "classes": 3, "images": 2} | sizes
    count = options.pop("images")
    with TokenFileWriter(ours.root / "real.sdt", **options) as writer:
        tokens = torch.zeros(count, *options["token_shape"], dtype=torch.int64)
        writer.append(tokens, torch.zeros(count, dtype=torch.int64))
    refused(ConfigError, words, "maskgit", "adversarial", ours)


def test_captions_of_real_images_are_numbers_of_prompts(files: Callable[[str], Files]) -> None:
    ours = files("meissonic")
    with (ours.root / "prompts.txt").open("a") as file:
        file.write("one more\n")
    words = "of images whose labels are numbers of the 4 prompts in text.prompts, got '3 classes'"
    refused(ConfigError, words, "meissonic", "adversarial", ours)


@pytest.mark.parametrize("text", ["a\nb\n", "a\nb\nc\nd\n"])
def test_prompts_that_are_not_one_a_class(text: str, files: Callable[[str], Files]) -> None:
    ours = files("maskgit")
    (ours.root / "prompts.txt").write_text(text)
    words = "text.prompts: must be one prompt for each of 3 classes"
    refused(ConfigError, words, "maskgit", "reward", ours)


def test_an_empty_prompt(files: Callable[[str], Files]) -> None:
    ours = files("maskgen_vq")
    (ours.root / "prompts.txt").write_text("a\n\nb\n")
    words = "line 2: a prompt must not be empty"
    refused(ConfigError, words, "maskgen_l", "distillation", ours)


# ---- what is damaged ---------------------------------------------------------------------------------------


def test_damaged_weights(files: Callable[[str], Files]) -> None:
    ours = files("maskgit")
    weights = ours.root / "teacher" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(ModelFileError, "is damaged: its sha256", "maskgit", "distillation", ours)


def test_damaged_tokens(files: Callable[[str], Files]) -> None:
    ours = files("maskbit")
    (ours.root / "real.sdt").write_bytes(b"SDTOKENS")
    refused(TokenFileError, "real.sdt", "maskbit", "adversarial", ours)


@pytest.mark.parametrize("role", ["teacher", "tokenizer"])
def test_a_resume_on_other_weights_under_the_same_path(
    role: str, files: Callable[[str], Files], tmp_path: Path
) -> None:
    ours = files("maskgit")
    run = tiny_run("maskgit", "reward", ours)
    build_published_trainer(run, tmp_path / "run", reward=brightness).run()
    family = "maskgit" if role == "teacher" else TOKENIZER["maskgit"]
    shutil.rmtree(ours.root / role)
    save_pretrained(tiny_model(family, seed=7), ours.root / role)
    trainer = build_published_trainer(run, tmp_path / "run", reward=brightness)
    with pytest.raises(CheckpointError, match=rf"sha256\.{role}: '?[0-9a-f]+"):
        trainer.resume()


# ---- samples and search ------------------------------------------------------------------------------------


def test_samples_need_a_tokenizer_and_a_model_that_makes_tokens(written: Any) -> None:
    root = written["maskgit"].root
    with pytest.raises(ConfigError, match=r"sample\.tokenizer: must be given"):
        ImageMaker.of(root / "teacher")
    with pytest.raises(ConfigError, match=r"sample\.model: must be one of 'maskgit'"):
        ImageMaker.of(root / "tokenizer", tokenizer=str(root / "tokenizer"))
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        ImageMaker.of(root / "nothing", tokenizer=str(root / "tokenizer"))
    text = written["maskgen_vq"]
    source, tokenizer = text.root / "teacher", str(text.root / "tokenizer")
    with pytest.raises(ConfigError, match=r"text\.prompts: must be a file of prompts"):
        ImageMaker.of(source, tokenizer=tokenizer, encoder=text.encoder)


def test_a_class_that_is_not_there(written: Any) -> None:
    root = written["maskgit"].root
    maker = ImageMaker.of(root / "teacher", tokenizer=str(root / "tokenizer"))
    with pytest.raises(ConfigError, match="condition: must be a number >= 0 and <= 2, got 3"):
        maker.numbers(2, condition=3)


def test_search_in_a_generator_of_another_kind(
    written: Any, files: Callable[[str], Files], tmp_path: Path
) -> None:
    ours = files("maskbit")
    run = tiny_run("maskbit", "distillation", ours)
    build_published_trainer(run, tmp_path / "first").run()
    for changes, words in (
        (
            ("family=maskgit", "bits=none"),
            "generator: must be of the family maskgit, got 'maskbit'",
        ),
        (("bits=10",), "generator: must be of bits = 10, got '8 bits'"),
    ):
        settings = tiny_run("maskbit", "tteo", ours, f"generator={tmp_path / 'first'}", *changes)
        with pytest.raises(ConfigError, match=words):
            search(settings, reward=brightness)
    settings = tiny_run("maskbit", "tteo", ours)
    with pytest.raises(ConfigError, match="generator: must be given: a finished run"):
        search(settings, reward=brightness)
