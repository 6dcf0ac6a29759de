"""What a GPU would launch, seen without one: Triton's kernels, and torch's operators."""

from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from gptfast.ops.triton import launch, linear  # noqa: E402

RESERVING = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


def launched_by(op: Any) -> str | None:
    """Returns the name of one of torch's operators; None if it launches nothing."""
    name: str = op.name().partition("::")[2].partition(".")[0]
    return None if op.is_view or name in RESERVING else name


class Launches(TorchDispatchMode):
    """Lists the launches, in order, of operators that run in Triton's interpreter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        self._inside = False
        interpreted: Any = type(linear.linear_kernel.function)
        run = interpreted.run

        def inside(kernel: Any, *args: Any, **options: Any) -> Any:
            self._inside = True  # the interpreter's own operators do not count
            try:
                return run(kernel, *args, **options)
            finally:
                self._inside = False

        def note(kernel: launch.Kernel, _: Any) -> bool:
            self.names.append(kernel.name)
            return True

        monkeypatch.setattr(interpreted, "run", inside)
        monkeypatch.setattr(launch, "_watch", note)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = None if self._inside else launched_by(op)
        if name is not None:
            self.names.append(name)
        return op(*args, **(kwargs or {}))
