"""The commands. Each is a dataclass: its fields are the options, their comments the help."""

from gptfast.cli.commands.completion import Completion
from gptfast.cli.commands.data import DATA, Data
from gptfast.cli.commands.demo import Demo
from gptfast.cli.commands.eval import Eval
from gptfast.cli.commands.export import Export
from gptfast.cli.commands.generate import Generate
from gptfast.cli.commands.info import Info
from gptfast.cli.commands.inspect import Inspect
from gptfast.cli.commands.plot import Plot
from gptfast.cli.commands.reproduce import Reproduce
from gptfast.cli.commands.train import Train, train_preset

__all__ = [
    "DATA",
    "Completion",
    "Data",
    "Demo",
    "Eval",
    "Export",
    "Generate",
    "Info",
    "Inspect",
    "Plot",
    "Reproduce",
    "Train",
    "train_preset",
]
