"""``masked_cross_entropy`` beside what it replaces, at the shapes of the published teachers."""

from __future__ import annotations

from collections.abc import Callable


def test_masked_cross_entropy(timed: Callable[[], None]) -> None:
    timed()
