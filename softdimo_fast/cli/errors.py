"""What a command refuses."""

from __future__ import annotations


class UsageError(Exception):
    """An argument that a command cannot work with; the message is for the user."""
