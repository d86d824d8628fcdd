"""Argument types that commands share, as their help shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

MethodName = Annotated[str, Positional, arg(metavar="METHOD")]
RecipeName = Annotated[str, Positional, arg(metavar="RECIPE")]
RunFolder = Annotated[Path, Positional, arg(metavar="RUN")]
Seed = Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the recipe's)")]
CaptionFile = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="(optional)")]
ConfigFile = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="(optional)")]
Changes = Annotated[tuple[str, ...], arg(metavar="NAME=VALUE", help_behavior_hint="(optional)")]
DeviceName = Annotated[
    str | None, arg(metavar="DEVICE", help_behavior_hint="(default: cuda, else cpu)")
]
ModelSource = Annotated[str | None, arg(metavar="PATH", help_behavior_hint="(default: the run's)")]
