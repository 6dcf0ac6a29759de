"""`gptfast info`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Info:
    """Show the installation and the machine, and why something is missing."""

    def run(self) -> int:
        """Prints the table of `gptfast.info`."""
        from gptfast.info import print_info

        print_info()
        return 0
