"""Saved tensors back into modules and optimizers: all of them, of the same shape and dtype, or an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

# Stands for a parameter that has no state (never had a gradient), so that one that lost it is noticed.
_STATELESS = "(no state)"
_LISTED = 10


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or cannot be used."""


def restore(what: str, current: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """Copies ``loaded`` into ``current`` in place, exactly; nothing is copied unless everything fits.

    Args:
        what: whose tensors these are, for the message.
        current: what is overwritten, such as ``module.state_dict()``.
        loaded: as saved.

    Raises:
        CheckpointError: with the missing and unexpected keys, and those of another shape or dtype, at most
            ten of each.
    """
    shared = [key for key in current if key in loaded]
    other = [
        f"{key}: {_form(loaded[key])}, expected {_form(current[key])}"
        for key in shared
        if _form(loaded[key]) != _form(current[key])
    ]
    _require_fit(
        what,
        missing=[key for key in current if key not in loaded],
        unexpected=[key for key in loaded if key not in current],
        other=other,
    )
    with torch.no_grad():
        for key in shared:
            current[key].copy_(loaded[key])


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """The per-parameter state of an optimizer, under "PARAMETER/STATE", for example "head.weight/exp_avg".

    Learning rates and other settings are not in it: they follow from the config and the step.

    Args:
        optimizer: whose every state is a tensor, as those of Adam, SGD and their relatives.
        names: of the parameters, in the order of the optimizer's groups.

    Raises:
        ValueError: there are not as many names as parameters, or names repeat.
        TypeError: a state is not a tensor.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter, _ in _parameters(optimizer, names):
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if not isinstance(value, Tensor):
                kind = type(value).__name__
                raise TypeError(f"optimizer state {key!r} of {name!r} must be a tensor, got {kind}")
            tensors[f"{name}/{key}"] = value.detach()
        if not state:
            tensors[f"{name}/{_STATELESS}"] = torch.empty(0, dtype=torch.uint8)
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Sequence[str], loaded: Mapping[str, Tensor]
) -> None:
    """Puts what ``optimizer_tensors`` gave into an optimizer, bit for bit, in place of its present state.

    ``Optimizer.load_state_dict`` would cast float32 moments of bfloat16 parameters; this does not.

    Raises:
        CheckpointError: as ``restore``.
        ValueError: there are not as many names as parameters, or names repeat.
    """
    parameters = _parameters(optimizer, names)
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in loaded.items():
        name, _, state = key.rpartition("/")
        states.setdefault(name, {})[state] = value
    known = {name for name, _, _ in parameters}
    _require_fit(
        "the optimizer",
        missing=[name for name, _, _ in parameters if name not in states],
        unexpected=[name for name in states if name not in known],
        other=[
            f"{name}/{state}: {list(value.shape)}, for a parameter {list(parameter.shape)}"
            for name, parameter, _ in parameters
            for state, value in states.get(name, {}).items()
            if state != _STATELESS and not _fits(value, parameter)
        ],
    )
    optimizer.state.clear()
    for name, parameter, group in parameters:
        for key, value in states[name].items():
            if key != _STATELESS:
                device = _device(key, parameter, group)
                optimizer.state[parameter][key] = value.detach().to(device, copy=True)


def _parameters(
    optimizer: torch.optim.Optimizer, names: Sequence[str]
) -> list[tuple[str, Tensor, dict[str, object]]]:
    """Name, parameter and group of each."""
    pairs = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    if len(pairs) != len(names) or len(set(names)) != len(names):
        count = f"{len(names)} ({len(set(names))} different)"
        raise ValueError(f"names must be one for each of {len(pairs)} parameters, got {count}")
    return [(name, p, group) for name, (p, group) in zip(names, pairs, strict=True)]


def _fits(value: Tensor, parameter: Tensor) -> bool:
    """Counters are scalars; moments have the parameter's shape, factored ones 1 in some places."""
    return value.ndim == 0 or (
        value.ndim == parameter.ndim
        and all(
            mine in (1, theirs) for mine, theirs in zip(value.shape, parameter.shape, strict=True)
        )
    )


def _device(key: str, parameter: Tensor, group: Mapping[str, object]) -> torch.device:
    """Where torch keeps it: the step count on the CPU, unless the kernel reads it."""
    if key == "step" and not (group.get("capturable") or group.get("fused")):
        return torch.device("cpu")
    return parameter.device


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _require_fit(
    what: str, *, missing: Sequence[str], unexpected: Sequence[str], other: Sequence[str]
) -> None:
    problems = {"missing": missing, "unexpected": unexpected, "of another shape or dtype": other}
    lines = [f"{len(keys)} {word}: {_some(keys)}" for word, keys in problems.items() if keys]
    if lines:
        raise CheckpointError(f"{what}: the saved tensors do not fit:\n  " + "\n  ".join(lines))


def _some(keys: Iterable[str]) -> str:
    keys = list(keys)
    more = f", and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(keys[:_LISTED]) + more
