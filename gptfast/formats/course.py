"""The course's models: weights with the names of its R code, in .safetensors or by `torch.save`."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.errors import CheckpointError, ConfigError
from gptfast.formats.weight_files import read_weights
from gptfast.model import GPT
from gptfast.storable import assembled

_BLOCK_NAMES = {
    "MM.in_proj_weight": "attn.c_attn.weight",
    "MM.in_proj_bias": "attn.c_attn.bias",
    "MM.out_proj.weight": "attn.c_proj.weight",
    "MM.out_proj.bias": "attn.c_proj.bias",
    "scale1.weight": "ln_1.weight",
    "scale1.bias": "ln_1.bias",
    "scale2.weight": "ln_2.weight",
    "scale2.bias": "ln_2.bias",
    "FFN.0.weight": "mlp.c_fc.weight",
    "FFN.0.bias": "mlp.c_fc.bias",
    "FFN.2.weight": "mlp.c_proj.weight",
    "FFN.2.bias": "mlp.c_proj.bias",
}
_NAMES = {
    "ln_f.weight": "lm_head.weight",
    "scale3.weight": "ln_f.weight",
    "scale3.bias": "ln_f.bias",
}
_SIZES = ("wpe.weight", "wte.weight")  # which tell block_size, vocab_size and n_embd
OWN = "scale3.weight"  # that no other project's model has


def read(path: str | Path, n_head: int | None) -> tuple[GPT, None]:
    """Reads a file of weights with the course's names.

    Args:
        path: .safetensors, or what `torch.save(model.state_dict(), path)` wrote.
        n_head: H, which the weights do not tell.

    Returns:
        The model, in evaluation mode and in the dtypes of the file, and no tokenizer, for the file
        has none.

    Raises:
        ConfigError: `n_head` is None or does not fit.
        CheckpointError: The file is missing, damaged, or its weights are not such a model's.
    """
    path = Path(path)
    if n_head is None:
        raise ConfigError(
            f"{path}: weights with the course's names do not tell how many heads there are: "
            "gptfast.load(path, n_head=...) and gptfast export --n-head N read them"
        )
    content = {str(name): weight for name, weight in read_weights(path).items()}
    return _model(content, n_head, path).eval(), None


def from_state_dict(state_dict: Mapping[str, Tensor], n_head: int) -> GPT:
    """Builds the model whose weights have the course's names.

    Args:
        state_dict: `wpe.weight wte.weight MM.j.* scale1.j.* scale2.j.* scale3.* FFN.j.0.*
            FFN.j.2.* ln_f.weight`; without `MM` it is the model without attention. The model gets
            copies, in the same dtypes.
        n_head: H, which the weights do not tell.

    Raises:
        ConfigError: `n_head` does not fit.
        CheckpointError: A weight is missing, left over or of another shape.
    """
    return _model(state_dict, n_head, Path("the course's state dict"))


def _model(weights: Mapping[str, Tensor], n_head: int, source: Path) -> GPT:
    for name in _SIZES:
        if not isinstance(weights.get(name), Tensor) or weights[name].dim() != 2:
            raise CheckpointError(
                f"{source}: expected a matrix {name!r}, as the course's models have, "
                f"got {sorted(map(str, weights))[:4]} ..."
            )
    block_size, n_embd = weights["wpe.weight"].shape
    config = GPTConfig(
        block_size=block_size,
        vocab_size=weights["wte.weight"].shape[0],
        n_layer=sum(name.startswith("FFN.") and name.endswith(".0.weight") for name in weights),
        n_head=n_head,
        n_embd=n_embd,
        attention=any(name.startswith("MM.") for name in weights),
    )
    copies = {own_name(name): _copied(weight) for name, weight in weights.items()}
    return assembled(config, copies, source)


def _copied(weight: Tensor) -> Tensor:
    return weight.detach().clone() if isinstance(weight, Tensor) else weight


def own_name(name: str) -> str:
    """Maps `MM.0.in_proj_weight` to `h.0.attn.c_attn.weight`; returns unknown names unchanged."""
    head, _, rest = name.partition(".")
    layer, _, tail = rest.partition(".")
    if layer.isdigit() and f"{head}.{tail}" in _BLOCK_NAMES:
        return f"h.{layer}.{_BLOCK_NAMES[f'{head}.{tail}']}"
    return _NAMES.get(name, name)
