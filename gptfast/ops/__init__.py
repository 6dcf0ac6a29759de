"""The operations of a GPT: a name each, kernels chosen by torch's dispatcher.

`reference` has the same names in plain torch and is the specification.
"""

from gptfast.ops import flops, reference
from gptfast.ops.attention import causal_attention
from gptfast.ops.cross_entropy import linear_cross_entropy
from gptfast.ops.embedding import embedding
from gptfast.ops.ffn import layer_norm_ffn
from gptfast.ops.linear import layer_norm_linear, linear_residual
from gptfast.ops.self_attention import layer_norm_attention

flops.register()

__all__ = [
    "causal_attention",
    "embedding",
    "layer_norm_attention",
    "layer_norm_ffn",
    "layer_norm_linear",
    "linear_cross_entropy",
    "linear_residual",
    "reference",
]
