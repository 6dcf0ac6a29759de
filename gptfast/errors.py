"""Expected errors with a one-sentence message, which the command line prints without traceback."""


class GptfastError(Exception):
    """Invalid input, or something that this machine or build cannot do."""


class ConfigError(GptfastError, ValueError):
    """A model, training or generation option that is unknown, invalid or conflicts with another."""


class DataError(GptfastError, ValueError):
    """A text, corpus or token sequence that is missing, damaged, too short or out of vocabulary."""


class CheckpointError(GptfastError, RuntimeError):
    """A checkpoint that cannot be written, or is missing, damaged, of another format or shape."""


class BackendError(GptfastError, RuntimeError):
    """A requested backend or instruction set that this build or machine does not support."""


def reason(error: OSError) -> str:
    """What the system says of a failure, without the path, which the sentence around it names."""
    return error.strerror or str(error)
