"""Whether the engines for generation, which read a model's weights and call no module, know it."""

from torch import nn

from gptfast import plain
from gptfast.config import GPTConfig
from gptfast.model import GPT
from gptfast.modules import Block


def unsupported_part(model: GPT) -> str | None:
    """Returns the first part of a model that an engine would overlook, and why; None without one.

    Hooks on GPT and Block count here, for an engine does not call these either.
    """
    found = plain.overridden(model, GPT)
    if found is not None:
        return f"of the model, {found}"
    shapes = _shapes(model.config)
    for name, module, check in plain.layers_of(model, plain.bypassable, _block):
        found = check(module)
        if found is not None:
            return f"{name} {found}"
        expected = shapes.get(name.split(".", 2)[-1])
        weight = plain.parameter(module, "weight") if expected else None
        if weight is not None and weight.shape != expected:
            return f"{name} has a weight of shape {tuple(weight.shape)}, not {expected}"
    if len(model.h) != model.config.n_layer:
        return f"h has {len(model.h)} blocks, not {model.config.n_layer}"
    for block in model.blocks:
        found = _other_option(block, model.config)
        if found is not None:
            return f"h.{block.layer}.{found}"
    return None


def _block(module: nn.Module) -> str | None:
    return plain.bypassable(module) if type(module) is Block else plain.unmodified(module, Block)


def _other_option(block: Block, config: GPTConfig) -> str | None:
    if config.attention and block.attn.n_head != config.n_head:
        return f"attn has n_head={block.attn.n_head}, not {config.n_head}"
    if block.mlp.gelu != config.gelu:
        return f"mlp has gelu={block.mlp.gelu!r}, not {config.gelu!r}"
    return None


def _shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the layers' weights, by their names within a block."""
    C, V = config.n_embd, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("ln_1", "ln_2", "ln_f"), (C,))
    shapes |= {"wte": (V, C), "wpe": (config.block_size, C), "lm_head": (V, C)}
    shapes |= {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C)}
    return shapes | {"mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
