"""``masked_attention`` beside what it replaces, at the shapes of the published teachers."""

from __future__ import annotations

from collections.abc import Callable


def test_masked_attention(timed: Callable[[], None]) -> None:
    timed()
