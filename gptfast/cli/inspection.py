"""Formats what `gptfast inspect` prints about a checkpoint."""

from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from gptfast.attention_plots import plot_attention, plot_contributions
from gptfast.errors import ConfigError, DataError
from gptfast.heads import Shares, attention_terms, entropy, shares
from gptfast.model import GPT
from gptfast.pictures import visible
from gptfast.summary import parts_of
from gptfast.tokenizer import CharTokenizer, Tokenizer


def parameter_table(model: GPT) -> Table:
    """Returns a table of parameter shapes, one row per module; the layers share their rows."""
    table = Table(box=None, pad_edge=False)
    for title in ("module", "weight", "bias", "layers", "parameters"):
        table.add_column(title, justify="right" if title in ("layers", "parameters") else "left")
    parts = parts_of(model)
    for module, shapes, layers, parameters in parts:
        weight, bias = shapes["weight"], shapes.get("bias", "")
        table.add_row(module, weight, bias, str(layers or ""), f"{parameters:,}")
    total = sum(part.parameters for part in parts)
    table.add_row("total", "", "", "", f"{total:,}", style="bold")
    return table


def attention_report(
    model: GPT,
    tokenizer: Tokenizer | None,
    text: str,
    position: int | None = None,
    plot: Path | None = None,
) -> str:
    """Writes what each head attends to and, given a position, adds there; or draws the latter.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        text: What it reads.
        position: The token at which contributions are shown; negative ones count from the end.
        plot: A picture: of the contributions, or of the attention where no position is given.
    """
    if tokenizer is None or not text:
        raise ConfigError("--attention needs at least one character, and a model with a tokenizer")
    idx = tokenizer.encode_tensor(text)[None]  # (1, T)
    T, unit = idx.shape[1], tokenizer.unit
    if model.config.block_size < T:
        raise DataError(
            f"--attention takes at most block_size={model.config.block_size} {unit}s, got {T}"
        )
    if position is not None and not -T <= position < T:
        raise ConfigError(
            f"--contributions takes a position from 0 to {T - 1}, or from {-T} to -1, counted from"
            f" the end, got {position}"
        )
    labels = [*text] if unit == "character" else token_labels(tokenizer, idx[0].tolist())
    weights = model.attention_weights(idx)[:, 0]  # (L, H, T, T)
    report = _attention_maps(weights, labels)
    if position is not None:
        found = shares(attention_terms(model, idx), 0, position)
        where = f"position {position % T}, {labels[position]!r}"
        if plot is None:
            return report + _contribution_table(found, where)
        plot_contributions(found, where, plot)
    elif plot is not None:
        plot_attention(weights, labels, plot)
    return report


def token_labels(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Returns what tokens write, spaces made visible and parts of characters in hexadecimal."""
    pieces = tokenizer.pieces
    return [pieces[i].decode("utf-8", "backslashreplace").replace(" ", "␣") for i in ids]


def tokenizer_line(tokenizer: Tokenizer | None) -> str:
    """Describes a tokenizer."""
    if isinstance(tokenizer, CharTokenizer):
        padding = "<PAD> and " if tokenizer.padded else ""
        return f"{tokenizer.vocab_size} ids: {padding}{''.join(tokenizer.chars)!r}"
    return "none" if tokenizer is None else repr(tokenizer)


def _attention_maps(weights: Tensor, labels: list[str]) -> str:
    """The attention weights (L, H, T, T) in tenths, with entropies, a row per token."""
    shown = [visible(label) for label in labels]
    width = max(map(len, shown))
    entropies = entropy(weights).tolist()
    lines = []
    for layer, heads in enumerate(weights.tolist()):
        for head, rows in enumerate(heads):
            lines += ["", f"layer {layer}, head {head}: tenths of the attention, entropy in nats"]
            if width == 1:  # the names of the columns
                lines.append(f"    {''.join(shown)}")
            for i, row in enumerate(rows):
                tenths = "".join(str(min(9, int(10 * weight))) for weight in row[: i + 1])
                nats = entropies[layer][head][i]
                lines.append(f"  {shown[i]:<{width}} {tenths:<{len(rows)}}  {nats:.2f}")
    return "\n".join([*lines, ""])


def _contribution_table(found: Shares, where: str) -> str:
    """The norm and the projection of each term, and of their sum."""
    lines = ["", f"what each head adds to the attention's output at {where}:"]
    for layer, output in enumerate(found.output.tolist()):
        lines += ["", f"layer {layer:<3} {'norm':>10} {'projection on the output':>26}"]
        norms, projections = found.norms[layer].tolist(), found.projections[layer].tolist()
        names = [f"head {name}" if name.isdigit() else name for name in found.names]
        rows = zip([*names, "sum"], [*norms, output], [*projections, sum(projections)], strict=True)
        lines += [f"  {name:<7} {norm:#10.4g} {along:#26.4g}" for name, norm, along in rows]
    lines += ["", f"The terms sum to the output (largest difference {found.difference:.1e})."]
    return "\n".join([*lines, ""])


def lines_of(values: Any) -> list[str]:
    """Formats stored values, one line each; escapes lone surrogates, which UTF-8 cannot encode."""
    lines = [f"{k}: {v}" for k, v in values.items()] if isinstance(values, dict) else [str(values)]
    return [line.encode("utf-8", "backslashreplace").decode("utf-8") for line in lines]
