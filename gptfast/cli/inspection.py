"""Formats what `gptfast inspect` prints about a checkpoint."""

import re
from typing import Any

from rich.table import Table

from gptfast.errors import ConfigError, DataError
from gptfast.model import GPT
from gptfast.tokenizer import CharTokenizer


def parameter_table(model: GPT) -> Table:
    """Returns a table of parameter shapes, one row per module; the layers share their rows."""
    shapes: dict[str, dict[str, str]] = {}  # module -> parameter -> shape
    numbers: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        module, _, kind = re.sub(r"^h\.\d+", "h.*", name).rpartition(".")
        shapes.setdefault(module, {})[kind] = " x ".join(str(size) for size in parameter.shape)
        numbers[module] = numbers.get(module, 0) + parameter.numel()
    table = Table(box=None, pad_edge=False)
    for title in ("module", "weight", "bias", "layers", "parameters"):
        table.add_column(title, justify="right" if title in ("layers", "parameters") else "left")
    for module, found in shapes.items():
        layers = str(model.config.n_layer) if module.startswith("h.") else ""
        weight, bias = found["weight"], found.get("bias", "")
        table.add_row(module, weight, bias, layers, f"{numbers[module]:,}")
    total = sum(parameter.numel() for parameter in model.parameters())
    table.add_row("total", "", "", "", f"{total:,}", style="bold")
    return table


def attention_maps(model: GPT, tokenizer: CharTokenizer | None, text: str) -> str:
    """Returns the attention weights of each head as digits (tenths), one row per query."""
    if tokenizer is None or not text:
        raise ConfigError("--attention needs at least one character, and a model with a tokenizer")
    if len(text) > model.config.block_size:
        raise DataError(
            f"--attention takes at most block_size={model.config.block_size} characters, "
            f"got {len(text)}"
        )
    weights = model.attention_weights(tokenizer.encode_tensor(text)[None])[:, 0]  # (L, H, T, T)
    shown = [char if char.isprintable() else "⏎" for char in text]
    lines = []
    for layer, heads in enumerate(weights.tolist()):
        for head, rows in enumerate(heads):
            lines += ["", f"layer {layer}, head {head}: tenths of the attention"]
            lines.append(f"    {''.join(shown)}")
            for i, row in enumerate(rows):
                tenths = "".join(str(min(9, int(10 * weight))) for weight in row[: i + 1])
                lines.append(f"  {shown[i]} {tenths}")
    return "\n".join([*lines, ""])


def lines_of(values: Any) -> list[str]:
    """Formats stored values, one line each; escapes lone surrogates, which UTF-8 cannot encode."""
    lines = [f"{k}: {v}" for k, v in values.items()] if isinstance(values, dict) else [str(values)]
    return [line.encode("utf-8", "backslashreplace").decode("utf-8") for line in lines]
