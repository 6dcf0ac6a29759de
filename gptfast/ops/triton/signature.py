"""What a call of a kernel depends on: its signature, read by generated straight-line Python.

A launch must cost a few microseconds, and loops over a kernel's thirty arguments take more. So each
kernel gets functions written for its parameters.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import triton
from torch import Tensor

LATER = object()  # stands for a constant that a call leaves to the configuration


class Launch(NamedTuple):
    """A compiled kernel and the arguments that its launcher takes."""

    launcher: Callable[..., None]
    function: int
    packed: Any
    constants: Mapping[str, Any]  # for the grid
    compiled: Any  # unloads `function` when it is deleted


def bound(
    launch: Callable[..., None], parameters: Iterable[inspect.Parameter], later: set[str]
) -> Callable[..., None]:
    """Makes a function of a grid and a kernel's arguments; a call may omit those in `later`.

    It calls launch(grid, classes of the arguments, their values, options).
    """
    defaults = {
        each.name: LATER if each.default is each.empty else each.default
        for each in parameters
        if each.name in later or each.default is not each.empty
    }
    names = [each.name for each in parameters]
    takes = (f"{name}=defaults['{name}']" if name in defaults else name for name in names)
    classes = "".join(f"{name}.__class__, " for name in names)
    call = f"launch(grid, ({classes}), ({', '.join(names)},), options)"
    made: Callable[..., None] = eval(
        f"lambda grid, {', '.join(takes)}, **options: {call}",
        {"launch": launch, "defaults": defaults},
    )
    return made


class Reader:
    """Reads arguments of given classes: their signature, and the words that a kernel is given.

    The signature decides which compiled kernel is right. It holds all for which Triton compiles
    anew, or more:
    - of a tensor its dtype, its device, and its address modulo 16;
    - of an integer whether it is 1, its value modulo 16, and what exceeds 31 bits; if it is in the
      kernel's do_not_specialize, only the last; if it is in the key of the choice, its value;
    - of a constant its value. Global constants of the kernel's module cannot change.
    A float or None counts by its class alone, a tensor descriptor by what Triton sees of it.
    """

    def __init__(self, parameters: list[Any], values: tuple[Any, ...], numbers: list[str]) -> None:
        driver = triton.runtime.driver.active
        self.launches: dict[tuple[Any, ...], Launch] = {}
        self.current_device, self.current_stream = (
            driver.get_current_device,
            driver.get_current_stream,
        )
        addresses, key, words = [], ["device"], []
        for each, value in zip(parameters, values, strict=True):
            name, word = each.name, each.name
            if each.is_constexpr or isinstance(value, bool):
                key.append(name)
            elif isinstance(value, Tensor):
                word = f"{name}_at"
                addresses.append(f"{word} = {name}.data_ptr()")
                key += [f"{name}.dtype", f"{name}.get_device()", f"{word} & 15"]
            elif isinstance(value, int):
                if name in numbers:
                    key.append(name)
                elif each.do_not_specialize:
                    key.append(f"{name} >> 31")
                else:
                    key.append(f"None if {name} == 1 else {name} & {~(2**31 - 16)}")
            elif value is not None and not isinstance(value, float):
                key.append(f"specialize(backend, {name}, False, True, True)")
            words.append(word)
        names = ", ".join(each.name for each in parameters)
        lines = [
            f"def read(device, {names}):",
            *addresses,
            f"return ({', '.join(key)},), ({', '.join(words)},)",
        ]
        scope: dict[str, Any] = {
            "specialize": triton.runtime.jit.native_specialize_impl,
            "backend": triton.compiler.make_backend(driver.get_current_target()),
        }
        exec("\n    ".join(lines), scope)
        self.read: Callable[..., Any] = scope["read"]
