"""`gptfast demo`."""

from dataclasses import dataclass

from gptfast.cli.options import Count, use_threads


@dataclass(frozen=True)
class Demo:
    """Train the course's model and compare it with the best possible, in under a minute."""

    seed: int = 1  # of the initial weights, the windows, the dropout and the samples
    threads: Count = None  # CPU threads; None: as many as can run at once

    def run(self) -> int:
        """Runs the demo; 1 if the model stayed too far from what it can reach."""
        from gptfast.cli.demo import demo

        use_threads(self.threads)
        return 0 if demo(self.seed).passed else 1
