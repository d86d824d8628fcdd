"""The emulated kernels, compiled at most once."""

from __future__ import annotations

from types import ModuleType

import pytest
from support import emulation


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    return emulation.load()
