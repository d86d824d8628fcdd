"""What the benchmark refuses."""

from __future__ import annotations


class BenchmarkError(Exception):
    """An argument or a file that it cannot work with; the message is for the user."""
