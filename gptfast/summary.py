"""What a model is, in numbers: its parameters part by part, where they are, what computes."""

import re
from typing import TYPE_CHECKING, NamedTuple

from gptfast import markup
from gptfast.checks import dtype_name
from gptfast.config import GPTConfig

if TYPE_CHECKING:
    from gptfast.model import GPT


class Part(NamedTuple):
    """The parameters of a module; the layers' modules of one name are one part."""

    module: str  # its name, with * for the layer
    shapes: dict[str, str]  # of each parameter by its name, as "128 x 64"
    layers: int | None  # how many layers have it; None outside of them
    parameters: int  # numbers in all layers


def parts_of(model: "GPT") -> list[Part]:
    """Lists the parts of a model; a tensor that two parts share counts for the first."""
    shapes: dict[str, dict[str, str]] = {}
    numbers: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        module, _, kind = re.sub(r"^h\.\d+", "h.*", name).rpartition(".")
        shapes.setdefault(module, {})[kind] = " x ".join(map(str, parameter.shape))
        numbers[module] = numbers.get(module, 0) + parameter.numel()
    layers = model.config.n_layer
    return [
        Part(module, found, layers if module.startswith("h.") else None, numbers[module])
        for module, found in shapes.items()
    ]


def as_html(model: "GPT") -> str:
    """What a notebook shows of a model."""
    parts = parts_of(model)
    rows = [
        (part.module, ", ".join(f"{k} {v}" for k, v in part.shapes.items()), part.layers or "",
         f"{part.parameters:,}")
        for part in parts
    ]  # fmt: skip
    total = sum(part.parameters for part in parts)
    head = ("module", "shapes", "layers", "parameters")
    return markup.section(
        f"GPT of {total:,} parameters",
        markup.table(_facts(model)),
        markup.table([*rows, ("total", "", "", f"{total:,}")], head),
    )


def _facts(model: "GPT") -> list[tuple[str, str]]:
    config = model.config.to_dict()
    sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    usual = GPTConfig().to_dict()
    others = [name for name in config if name not in sizes and config[name] != usual[name]]
    dropping = ", with dropout" if model.config.dropout else ""
    tensors = list(model.parameters())
    size = sum(each.numel() * each.element_size() for each in tensors)
    dtypes = sorted({dtype_name(each.dtype) for each in tensors})
    facts = [
        ("shape", ", ".join(f"{name} {config[name]}" for name in sizes)),
        ("other options", ", ".join(f"{name} {config[name]}" for name in others)),
        ("dtype", f"{', '.join(dtypes)}: {size / 1e6:,.1f} MB"),
        ("device", ", ".join(sorted({str(each.device) for each in tensors}))),
        ("backend", f"{model.backend}: {model.computes_by}"),
        ("mode", f"training{dropping}" if model.training else "evaluation"),
    ]
    return [(name, value) for name, value in facts if value]
