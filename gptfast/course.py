"""Translates the parameter names of the course's models to gptfast's."""

_COURSE_BLOCK_NAMES = {
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
_COURSE_NAMES = {
    "ln_f.weight": "lm_head.weight",
    "scale3.weight": "ln_f.weight",
    "scale3.bias": "ln_f.bias",
}


def from_course_name(name: str) -> str:
    """Maps `MM.0.in_proj_weight` to `h.0.attn.c_attn.weight`; returns unknown names unchanged."""
    head, _, rest = name.partition(".")
    layer, _, tail = rest.partition(".")
    if layer.isdigit() and f"{head}.{tail}" in _COURSE_BLOCK_NAMES:
        return f"h.{layer}.{_COURSE_BLOCK_NAMES[f'{head}.{tail}']}"
    return _COURSE_NAMES.get(name, name)
