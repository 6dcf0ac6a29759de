"""GPT-2's weights as Hugging Face names and lays them out, in one file or several.

Its linear layers in the blocks are of the class Conv1D, whose weight is (inputs, outputs), the
transpose of nn.Linear's.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePath

import torch
from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.errors import CheckpointError
from gptfast.formats.weight_files import own_names, read_json
from gptfast.formats.weight_files import read_weights as read_content
from gptfast.integrity import reading
from gptfast.model import EMBEDDING, GPT, HEAD
from gptfast.storable import assembled, check_fit, skeleton, stored_tensors, with_all_biases

WEIGHTS_NAME = "model.safetensors"
TORCH_NAME = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"  # of the file that lists the shards
WEIGHTS_NAMES = tuple(
    f"{name}{suffix}" for name in (WEIGHTS_NAME, TORCH_NAME) for suffix in ("", INDEX_SUFFIX)
)

_PREFIX = "transformer."  # of all but the head; files of a GPT2Model lack it
_TRANSPOSED = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")


def read_weights(folder: Path, config: GPTConfig) -> GPT:
    """Reads a folder's weights into the model of its configuration.

    If there are several files, it reads the first in WEIGHTS_NAMES.

    Raises:
        CheckpointError: Weights are missing, damaged, left over, of another shape or no
            floating-point numbers; or there is a head of its own, although it is tied.
    """
    file = next((folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder}: no weights, expected {WEIGHTS_NAME} or {TORCH_NAME}")
    tensors = own_names(file, dict(_tensors(file)))
    expected = skeleton(config, tensors, file).state_dict()
    if config.tie_weights and HEAD not in tensors:
        del expected[HEAD]
    check_fit(tensors, {name: _turned(name, weight) for name, weight in expected.items()}, file)
    if config.tie_weights and HEAD in tensors:
        head, embedding = tensors.pop(HEAD), tensors[EMBEDDING]
        if head.dtype != embedding.dtype or not torch.equal(head, embedding):
            raise CheckpointError(
                f"{file}: tie_word_embeddings is true, but {HEAD} is not {EMBEDDING}"
            )
    with reading(file):
        for name, weight in tensors.items():  # copies, for what is mapped may change with the file
            tensors[name] = _turned(name, weight).clone(memory_format=torch.contiguous_format)
    return assembled(config, tensors, file)


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a file, or of all files that an index lists."""
    if not file.name.endswith(INDEX_SUFFIX):
        yield from read_content(file).items()
        return
    seen: set[str] = set()
    for name in shards(file):
        shard = file.with_name(name)
        for tensor, value in read_content(shard).items():
            if tensor in seen:
                raise CheckpointError(f"{shard}: {tensor} is in another file of the model as well")
            seen.add(tensor)
            yield tensor, value


def shards(index: Path) -> list[str]:
    """Returns the names of the files, beside an index, that have the weights.

    Raises:
        CheckpointError: The index is damaged, or names files elsewhere.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: lists no files with weights (weight_map)")
    for name in places.values():
        if not isinstance(name, str) or PurePath(name).name != name or not PurePath(name).suffix:
            raise CheckpointError(f"{index}: names no file that may be beside it, {name!r}")
    return sorted(set(places.values()))


def _turned(name: str, weight: Tensor) -> Tensor:
    """Turns a weight from one layout to the other; a view."""
    return weight.t() if _TRANSPOSED.fullmatch(name) else weight


def to_weights(model: GPT, config: GPTConfig) -> dict[str, Tensor]:
    """Returns a model's weights for Hugging Face, with zeros for biases that it lacks.

    Args:
        model: The model, with attention.
        config: Its configuration.

    Returns:
        Contiguous tensors on the CPU, without the head where it is tied.
    """
    tensors = with_all_biases(stored_tensors(model), config)
    return {
        name if name == HEAD else _PREFIX + name: _turned(name, weight).contiguous()
        for name, weight in tensors.items()
    }
