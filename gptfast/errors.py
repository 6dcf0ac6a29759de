"""Errors that one sentence explains; the command line prints that sentence without a traceback."""


class GptfastError(Exception):
    """A mistake in the input, or a refusal of the machine, that its message explains."""


class ConfigError(GptfastError, ValueError):
    """A model, training or generation option that is unknown or does not fit the others."""


class DataError(GptfastError, ValueError):
    """A text, corpus or token sequence that is missing, damaged, too short or out of vocabulary."""


class CheckpointError(GptfastError, RuntimeError):
    """A checkpoint that cannot be written, or is missing, damaged, foreign or of another shape."""


class BackendError(GptfastError, RuntimeError):
    """A backend or instruction set that was asked for and that this build or machine lacks."""
