"""The models of a published run: read, checked against each other, and told what they hold in memory."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from softdimo_fast import _config
from softdimo_fast.models import describe, from_pretrained
from softdimo_fast.models.class_token import ClassTokenTransformer
from softdimo_fast.models.hub import is_hub_id
from softdimo_fast.recipes.published_runs import (
    CLASS_FAMILIES,
    TOKENIZER_OF,
    PublishedGeneratorRun,
    PublishedTestTimeRun,
)

PublishedRun = PublishedGeneratorRun | PublishedTestTimeRun


def require_given(run: PublishedRun, *, but: tuple[str, ...] = ()) -> None:
    """Raises ConfigError for the first input that is not given, or is not there; nothing is read.

    Args:
        but: names, or groups of names, that are not needed.
    """
    missing = {name: what for name, what in run.missing().items() if not name.startswith(but)}
    for name, what in missing.items():
        others = [other for other in missing if other != name]
        also = f" (also missing: {', '.join(others)})" if others else ""
        _config.require(False, run, name, None, f"given: {what}, as --set {name}=PATH{also}")
    for name, path in _paths(run).items():
        if path is not None and not name.startswith(but):
            _require_there(run, name, path)


def _paths(run: PublishedRun) -> dict[str, str | None]:
    paths = {"text.encoder": run.text.encoder, "text.prompts": run.text.prompts}
    if isinstance(run, PublishedGeneratorRun):
        paths |= {
            "teacher": run.teacher, "student": run.student, "real_tokens": run.real_tokens
        }  # fmt: skip
    else:
        paths["generator"] = run.generator
    paths["tokenizer"] = run.tokenizer
    rewards = {} if run.rewards is None else run.rewards.named()
    paths |= {f"rewards.{name}.path": source.path for name, source in rewards.items()}
    return paths | {f"rewards.{name}.tokenizer": s.tokenizer for name, s in rewards.items()}


def _require_there(run: PublishedRun, name: str, path: str) -> None:
    if Path(path).exists():
        return
    model = name not in ("text.prompts", "real_tokens")
    if model and is_hub_id(path):
        return
    kinds = "a file, a folder or a hub id (owner/name[/path])" if model else "a file or a folder"
    _config.require(False, run, name, path, f"{kinds} that is there")


# ---------------------------------------------------------------------------------------------------
# reading


def load_model(run: PublishedRun, name: str, source: str) -> Any:
    """A transformer of the run's family and bits, float32, on the CPU, in eval mode.

    Args:
        name: of the setting that ``source`` is.

    Raises:
        ConfigError: it is of another family, or of other bits.
        FileNotFoundError, ModelFileError, ImportError: as from_pretrained.
    """
    model = from_pretrained(source)
    family = describe(model)["family"]
    _config.require(family == run.family, run, name, family, f"of the family {run.family}")
    if run.bits is not None:
        bits = model.config.bits
        _config.require(bits == run.bits, run, name, f"{bits} bits", f"of bits = {run.bits}")
    if run.family == "meissonic":
        model.config = replace(model.config, timestep=run.timestep)
    return model


def load_tokenizer(owner: object, model: Any, source: str) -> Any:
    """The tokenizer of a transformer, checked against it.

    Raises:
        ConfigError: it is of another family, or its tokens are others than the transformer's.
    """
    tokenizer = from_pretrained(source)
    family, wanted = describe(tokenizer)["family"], TOKENIZER_OF[describe(model)["family"]]
    _config.require(family == wanted, owner, "tokenizer", family, f"of the family {wanted}")
    require_tokens(
        owner, "tokenizer", model, vocabulary=tokenizer.codebook.shape[-2],
        token_shape=tokenizer.token_shape,
    )  # fmt: skip
    return tokenizer.requires_grad_(False)


def require_tokens(
    owner: object, name: str, model: Any, *, vocabulary: int, token_shape: tuple[int, ...]
) -> None:
    """Raises ConfigError unless these tokens are the model's: its codes and no [MASK], its shape."""
    shown = f"{vocabulary} codes in the shape {list(token_shape)}"
    expected = (
        f"of {model.vocabulary} codes in the shape {list(model.token_shape)}, with [MASK] = "
        f"{model.mask_id} beyond them, as the transformer"
    )
    fits = vocabulary == model.vocabulary <= model.mask_id
    fits = fits and tuple(token_shape) == tuple(model.token_shape)
    _config.require(fits, owner, name, shown, expected)


def require_same(run: PublishedRun, name: str, teacher: Any, description: Any) -> None:
    """Raises ConfigError unless a generator has the teacher's sizes."""

    # What it is told of time is a matter of the run, no size.
    def sizes(said: Any) -> Any:
        return {key: v for key, v in said["config"].items() if key not in ("timestep", "dropout")}

    ours = describe(teacher)
    same_family = description["family"] == ours["family"]
    changes = _config.difference(sizes(ours), sizes(description)) if same_family else ["family"]
    _config.require(
        not changes, run, name, "; ".join(changes), "a generator of the teacher's sizes"
    )


# ---------------------------------------------------------------------------------------------------
# what follows from a model


def classes_of(model: Any) -> int | None:
    """How many class labels condition it; None for those that take text."""
    return int(model.classes) if isinstance(model, ClassTokenTransformer) else None


def feature_shape(model: Any) -> tuple[int, int]:
    """Positions and width (T, H) of the model's ``features``."""
    family, config = describe(model)["family"], model.config
    positions: int = model.token_shape[0]
    if family in CLASS_FAMILIES:
        return positions + 1, config.hidden_dim
    if family == "meissonic":
        return positions // config.stride**2, config.width
    return positions, config.decoder_embed_dim


def weights_digest(model: Any) -> str:
    """sha256 of a model's names and weights, on the CPU: the same from whichever file they came."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().reshape(-1).view("uint8"))
    return digest.hexdigest()


def twin(model: Any) -> Any:
    """A copy with weights of its own."""
    return copy.deepcopy(model)


def require_device(run: Any, name: str, device: str) -> torch.device:
    """Raises ConfigError unless this machine has the device."""
    # No check of the config's: a config is as valid where the device is not.
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        _config.require(False, run, name, device, f"a device of this machine ({reason})")
    return torch.device(device)
