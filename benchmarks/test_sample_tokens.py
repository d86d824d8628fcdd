"""``sample_tokens`` beside what it replaces, at the shapes of the published teachers."""

from __future__ import annotations

from collections.abc import Callable


def test_sample_tokens(timed: Callable[[], None]) -> None:
    timed()
