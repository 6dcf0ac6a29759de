"""Small models that tests share, and comparisons of weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gptfast import GPT, GPTConfig

SMALL: dict[str, Any] = {"block_size": 8, "vocab_size": 5, "n_layer": 1, "n_embd": 16}
GPT2: dict[str, Any] = {  # what every GPT-2 has, and small sizes
    "block_size": 9, "vocab_size": 300, "n_embd": 8, "dropout": 0.1, "gelu": "tanh",
    "tie_weights": True, "padding_idx": None,
}  # fmt: skip


def model_of(config: GPTConfig, seed: int = 0, scale: float = 1.0) -> GPT:
    """Makes a model from a seed of torch's own generator.

    Args:
        config: its shape.
        seed: of its weights, and of the random numbers that torch draws next.
        scale: multiplies all weights: with 1.5, logits differ by much more than rounding does.
    """
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(scale)
    return model


def small_model(seed: int = 0, **options: Any) -> GPT:
    """Makes a model of one layer; `options` are fields of its config."""
    return model_of(GPTConfig(**SMALL | options), seed)


def small_gpt2(seed: int = 0, **options: Any) -> GPT:
    """Makes a model that Hugging Face's GPT-2 can hold, in evaluation mode."""
    return model_of(GPTConfig(**GPT2 | options), seed).eval()


def _differing(
    a: nn.Module | Mapping[str, Tensor], b: nn.Module | Mapping[str, Tensor]
) -> list[str]:
    """Returns the names of the weights that only one has, or that differ in dtype or value."""
    one, other = (each.state_dict() if isinstance(each, nn.Module) else each for each in (a, b))
    return sorted(one.keys() ^ other.keys()) + [
        name
        for name in sorted(one.keys() & other.keys())
        if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])
    ]


def same_weights(a: nn.Module | Mapping[str, Tensor], b: nn.Module | Mapping[str, Tensor]) -> bool:
    """Whether two models, or their state dicts, have the same weights, bit by bit."""
    return not _differing(a, b)


def assert_same_weights(
    a: nn.Module | Mapping[str, Tensor], b: nn.Module | Mapping[str, Tensor]
) -> None:
    """Both have the same weights, bit by bit; names those that differ."""
    names = _differing(a, b)
    assert not names, names
