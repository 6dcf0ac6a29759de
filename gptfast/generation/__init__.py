"""From a model to texts, and how likely given texts are.

Each loop generates what a `Request` asks for: the compiled engine on the CPU, CUDA graphs on a GPU,
plain torch, which is the specification.
"""

from gptfast.generation.api import (
    FinishReason,
    Generation,
    Piece,
    generate,
    make_request,
    stream,
)
from gptfast.generation.engine import PackedModel, pack
from gptfast.generation.scoring import Score, score

__all__ = [
    "FinishReason",
    "Generation",
    "PackedModel",
    "Piece",
    "Score",
    "generate",
    "make_request",
    "pack",
    "score",
    "stream",
]
