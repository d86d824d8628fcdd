"""See ``arguments``."""

from __future__ import annotations

import sys

from softdimo_fast.benchmark.arguments import main

sys.exit(main())
