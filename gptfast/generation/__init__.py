"""Generates texts by a model, and scores how likely given texts are.

A call becomes a `Request`, and one of three loops generates its sequences: the compiled engine on
the CPU, CUDA graphs on a GPU, or plain torch, which is the specification of both.
"""

from gptfast.generation.api import Piece, generate, make_request, stream
from gptfast.generation.engine import PackedModel, pack
from gptfast.generation.result import FinishReason, Generation
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
