"""Greedy generation in Python by torch and transformers, from the weights of a gptfast model.

Every `*_loop`, `*_cache` and `*_generate` makes a contender: a function without arguments that
returns the new tokens, (B, new) as lists. Prompts are B lists of tokens; only `sdpa_cache` and
transformers take lists of different lengths, shorter ones behind padding. Letters: B batch, T time,
C n_embd, H heads, D head_dim, V vocab_size, L layers.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generation_files
import peers
import torch
from common import DTYPES, captured
from torch import Tensor
from torch.nn import functional as F

from gptfast import GPT
from gptfast.formats.course import own_name

Tokens = list[list[int]]
Generate = Callable[[], Tokens]


def course_model(model: GPT) -> peers.CourseGPT:
    """Makes the course's model with these weights."""
    weights = model.state_dict()
    course_gpt = peers.CourseGPT(model.config).to(model.wte.weight.device)
    with torch.no_grad():
        for name, param in course_gpt.named_parameters():
            param.copy_(weights[own_name(name)])
    return course_gpt.eval()


def sdpa_model(model: GPT, dtype: str) -> peers.SdpaGPT:
    """Makes the SDPA model with these weights, in this dtype."""
    sdpa = peers.SdpaGPT(model.config)
    sdpa.load_state_dict(model.state_dict())
    return sdpa.to(model.wte.weight.device, DTYPES[dtype]).eval()


def left_padded(prompts: Tokens, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns prompts with zeros before shorter ones, (B, T) int64, and where a token is, bool."""
    T = max(map(len, prompts))
    rows = [[0] * (T - len(prompt)) + prompt for prompt in prompts]
    given = [[False] * (T - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    idx, mask = torch.tensor(rows, device="cpu"), torch.tensor(given, device="cpu")
    return idx.to(device), mask.to(device)


def is_of_one_length(prompts: Tokens) -> bool:
    """Whether no prompt needs padding."""
    return len(set(map(len, prompts))) == 1


def stacked(prompts: Tokens, device: torch.device) -> Tensor:
    """Returns prompts of one length as (B, T) int64. Raises ValueError if their lengths differ."""
    return torch.tensor(prompts, device="cpu").to(device)


def course_loop(model: GPT, prompts: Tokens, new: int) -> Generate:
    """The course's loop: every step computes the whole window and all its logits."""
    course, T = course_model(model), model.config.block_size
    prompt = stacked(prompts, model.wte.weight.device)

    @torch.no_grad()
    def run() -> Tokens:
        idx = prompt
        for _ in range(new):
            logits = course(idx[:, -T:])[:, -1]  # (B, V)
            idx = torch.cat([idx, logits.argmax(-1, keepdim=True)], dim=1)
        return idx[:, prompt.shape[1] :].tolist()

    return run


def sdpa_loop(model: GPT, dtype: str, prompts: Tokens, new: int) -> Generate:
    """nanoGPT's loop: every step computes the whole window, but only the last token's logits."""
    sdpa, T = sdpa_model(model, dtype), model.config.block_size
    prompt = stacked(prompts, model.wte.weight.device)

    @torch.no_grad()
    def run() -> Tokens:
        idx = prompt
        for _ in range(new):
            x = sdpa.hidden(idx[:, -T:])[:, -1]  # (B, C)
            idx = torch.cat([idx, sdpa.lm_head(x).argmax(-1, keepdim=True)], dim=1)
        return idx[:, prompt.shape[1] :].tolist()

    return run


def sdpa_cache(model: GPT, dtype: str, prompts: Tokens, new: int) -> Generate:
    """Eager torch with a cache of keys and values, allocated at its final size."""
    sdpa: Any = sdpa_model(model, dtype)
    config, device = model.config, model.wte.weight.device
    prompt, given = left_padded(prompts, device)
    B, length = prompt.shape
    H, D, capacity = config.n_head, config.head_dim, length + new
    padding = length - given.sum(1, keepdim=True)  # (B, 1)
    seen = None if is_of_one_length(prompts) else seen_places(padding, capacity)

    def attend(attention: Any, x: Tensor, cache: Tensor, start: int) -> Tensor:
        t = x.shape[1]
        q, k, v = attention.c_attn(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        cache[0, :, :, start : start + t], cache[1, :, :, start : start + t] = k, v
        keys, values = cache[:, :, :, : start + t]  # (B, H, start + t, D) each
        mask = None if seen is None else seen[:, :, start : start + t, : start + t]
        causal = t > 1 and mask is None
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=causal)
        return attention.c_proj(y.transpose(1, 2).flatten(2))

    def step(idx: Tensor, caches: Tensor, start: int) -> Tensor:
        positions = torch.arange(start, start + idx.shape[1], device=device)
        if seen is not None:
            positions = (positions - padding).clamp(min=0)  # (B, t)
        x = sdpa.wte(idx) + sdpa.wpe(positions)
        for block, cache in zip(sdpa.h, caches, strict=True):
            x = x + attend(block.attn, block.ln_1(x), cache, start)
            x = x + block.mlp(block.ln_2(x))
        return sdpa.lm_head(sdpa.ln_f(x[:, -1])).argmax(-1, keepdim=True)  # (B, 1)

    @torch.no_grad()
    def run() -> Tokens:
        size = (config.n_layer, 2, B, H, capacity, D)
        caches = torch.empty(size, dtype=DTYPES[dtype], device=device)
        idx, out, start = prompt, [], 0
        for _ in range(new):
            token = step(idx, caches, start)
            out.append(token)
            start, idx = start + idx.shape[1], token
        return torch.cat(out, dim=1).tolist()

    return run


def seen_places(padding: Tensor, capacity: int) -> Tensor:
    """Returns which places attend to which, (B, 1, capacity, capacity); `padding` is (B, 1).

    Padding attends to itself, since the softmax of nothing is NaN.
    """
    places = torch.arange(capacity, device=padding.device)
    after = places[:, None] >= places  # (capacity, capacity)
    token = places >= padding[..., None]  # (B, 1, capacity)
    return ((after & token) | (places[:, None] == places))[:, None]


def static_cache(model: GPT, dtype: str, prompts: Tokens, new: int) -> Generate:
    """A cache that stays where it is, and on a GPU a CUDA graph of the step: gpt-fast's way.

    A step attends to the whole cache, with a mask of the places that are filled.
    """
    sdpa: Any = sdpa_model(model, dtype)
    config, device = model.config, model.wte.weight.device
    prompt = stacked(prompts, device)
    B, length = prompt.shape
    H, D, capacity = config.n_head, config.head_dim, length + new
    size = (config.n_layer, 2, B, H, capacity, D)
    caches = torch.zeros(size, dtype=DTYPES[dtype], device=device)
    token = torch.zeros(B, 1, dtype=torch.int64, device=device)  # the newest of each text
    position = torch.zeros(1, dtype=torch.int64, device=device)  # its place
    out = torch.zeros(B, capacity, dtype=torch.int64, device=device)
    seen = torch.ones(capacity, capacity, dtype=torch.bool, device=device).tril()

    def forward(idx: Tensor, positions: Tensor) -> Tensor:
        x = sdpa.wte(idx) + sdpa.wpe(positions)  # (B, t, C)
        for block, (keys, values) in zip(sdpa.h, caches, strict=True):
            qkv = block.attn.c_attn(block.ln_1(x)).unflatten(-1, (3, H, D))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, t, D) each
            keys.index_copy_(2, positions, k)
            values.index_copy_(2, positions, v)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[positions])
            x = x + block.attn.c_proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        return sdpa.lm_head(sdpa.ln_f(x[:, -1])).argmax(-1, keepdim=True)  # (B, 1)

    def step() -> None:
        drawn = forward(token, position)
        position.add_(1)
        token.copy_(drawn)
        out.index_copy_(1, position, drawn)

    advance = captured(step) if device.type == "cuda" else lambda: step

    @torch.no_grad()
    def run() -> Tokens:
        next_token = advance()
        first = forward(prompt, torch.arange(length, device=device))
        token.copy_(first)
        position.fill_(length)
        out[:, length : length + 1] = first
        for _ in range(new - 1):
            next_token()
        return out[:, length:].tolist()

    return run


def installed(*modules: str) -> bool:
    """Whether these packages can be imported; `pip install -e .[peers]` installs all."""
    return all(importlib.util.find_spec(module) is not None for module in modules)


def transformers_generate(model: GPT, dtype: str, prompts: Tokens, new: int) -> Generate:
    """transformers' generate, with its cache; for the first token alone a forward pass."""
    from transformers import GPT2LMHeadModel

    device = model.wte.weight.device
    with tempfile.TemporaryDirectory() as folder:
        generation_files.write_huggingface(model, Path(folder))
        loaded: Any = GPT2LMHeadModel.from_pretrained(folder)
    other = loaded.eval().to(device, DTYPES[dtype])
    idx, mask = left_padded(prompts, device)

    @torch.no_grad()
    def first() -> Tokens:
        logits = other(idx, use_cache=True, logits_to_keep=1).logits  # (B, 1, V)
        return logits.argmax(-1).tolist()

    @torch.no_grad()
    def run() -> Tokens:
        out = other.generate(
            idx,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        return out[:, idx.shape[1] :].tolist()

    return first if new == 1 and is_of_one_length(prompts) else run
