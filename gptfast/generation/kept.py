"""Decoders kept for the next call with a model: their caches and graphs take long to make."""

import threading
from weakref import WeakKeyDictionary

import torch

from gptfast.generation.decoder import Decoder, Shape
from gptfast.generation.weights import Weights, parameters_of
from gptfast.model import GPT
from gptfast.ops.sampling import Sampling

KEPT_BYTES = 512 << 20  # of the decoders kept for a model, at most, or
KEPT_SHARE = 16  # the GPU's memory divided by this, where that is more

# Ordered by use, most recent last.
_kept: WeakKeyDictionary[GPT, list[Decoder]] = WeakKeyDictionary()
_lock = threading.Lock()  # of `_kept`: several threads may generate with one model


def take_decoder(model: GPT, shape: Shape, how: Sampling) -> Decoder:
    """Returns a decoder, with the model's weights as they are now, that nobody else has."""
    weights = parameters_of(model)
    with _lock:
        mine = _kept.get(model, [])
        mine[:] = [each for each in mine if each.weights.fits(weights)]  # others' weights moved
        decoder = next((each for each in mine if each.shape == shape), None)
        if decoder is not None:
            mine.remove(decoder)
    if decoder is None:
        with torch.inference_mode(False):  # or its tensors could not be written outside of it
            decoder = Decoder(shape, Weights(model, shape.dtype, shape.copied))
    else:
        decoder.clear()
        decoder.weights.take(weights)
    decoder.set_sampling(how)
    return decoder


def keep_decoder(model: GPT, decoder: Decoder) -> None:
    """Keeps a decoder for the next call; drops the oldest ones if they take too much memory."""
    decoder.weights.let_go()
    most = KEPT_BYTES
    if decoder.device.type == "cuda":
        memory = torch.cuda.get_device_properties(decoder.device).total_memory
        most = max(most, memory // KEPT_SHARE)
    with _lock:
        mine = _kept.setdefault(model, [])
        mine.append(decoder)
        while sum(each.bytes for each in mine) > most:
            mine.pop(0)
