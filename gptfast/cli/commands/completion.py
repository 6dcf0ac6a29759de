"""`gptfast completion`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Completion:
    """Print the script by which a shell completes commands, options and choices."""
