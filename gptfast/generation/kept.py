"""Decoders kept for the next call with a model: their caches and graphs take long to make."""

from weakref import WeakKeyDictionary

import torch

from gptfast.generation.decoder import Decoder, Shape
from gptfast.generation.weights import Weights, parameters_of
from gptfast.model import GPT
from gptfast.ops.sampling import Sampling

KEPT_BYTES = 512 << 20  # of the decoders kept for a model, at most, or
KEPT_SHARE = 16  # the GPU's memory divided by this, where that is more

_kept: WeakKeyDictionary[GPT, list[Decoder]] = WeakKeyDictionary()  # the last one used last


def take_decoder(model: GPT, shape: Shape, how: Sampling) -> Decoder:
    """Returns a decoder, with the model's weights as they are now, that nobody else has."""
    mine, weights = _kept.get(model, []), parameters_of(model)
    mine[:] = [each for each in mine if each.weights.fits(weights)]  # of weights that have moved
    for decoder in mine:
        if decoder.shape == shape:
            mine.remove(decoder)
            decoder.weights.take(weights)
            decoder.clear()
            break
    else:
        with torch.inference_mode(False):  # or its tensors could not be written outside of it
            decoder = Decoder(shape, Weights(model, shape.dtype, shape.copied))
    decoder.set_sampling(how)
    return decoder


def keep_decoder(model: GPT, decoder: Decoder) -> None:
    """Keeps a decoder for the next call; the oldest ones go where they take too much memory."""
    decoder.weights.let_go()
    mine = _kept.setdefault(model, [])
    mine.append(decoder)
    most = KEPT_BYTES
    if decoder.device.type == "cuda":
        memory = torch.cuda.get_device_properties(decoder.device).total_memory
        most = max(most, memory // KEPT_SHARE)
    while sum(each.bytes for each in mine) > most:
        mine.pop(0)
