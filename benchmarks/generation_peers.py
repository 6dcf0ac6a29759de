"""How others generate greedily from the weights of a gptfast model, each as its users call it.

Every function here makes a contender: a call without arguments that returns the new tokens,
(B, new) as lists. Letters: B batch, T time, C n_embd, H heads, D head_dim, V vocab_size, L layers.
"""

import copy
import importlib.util
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
from common import DTYPES
from torch import Tensor, nn
from torch.nn import functional as F

from gptfast import GPT
from gptfast.model import from_course_name

Tokens = list[list[int]]
Generate = Callable[[], Tokens]


def course_model(model: GPT) -> peers.CourseGPT:
    """The course's model with these weights."""
    course_gpt, weights = peers.CourseGPT(model.config), model.state_dict()
    with torch.no_grad():
        for name, param in course_gpt.named_parameters():
            param.copy_(weights[from_course_name(name)])
    return course_gpt.eval()


def sdpa_model(model: GPT, dtype: str) -> peers.SdpaGPT:
    """The model by torch's fused attention, in this dtype."""
    sdpa = peers.SdpaGPT(model.config)
    sdpa.load_state_dict(model.state_dict())
    return sdpa.to(DTYPES[dtype]).eval()


def course_loop(model: GPT, prompt: Tensor, new: int) -> Generate:
    """The course's loop: the whole window, all logits, at every step."""
    course, T = course_model(model), model.config.block_size

    @torch.no_grad()
    def run() -> Tokens:
        idx = prompt
        for _ in range(new):
            logits = course(idx[:, -T:])[:, -1]  # (B, V)
            idx = torch.cat([idx, logits.argmax(-1, keepdim=True)], dim=1)
        return idx[:, prompt.shape[1] :].tolist()

    return run


def sdpa_loop(model: GPT, dtype: str, prompt: Tensor, new: int) -> Generate:
    """The loop of nanoGPT: the whole window at every step, logits of its last token."""
    sdpa, T = sdpa_model(model, dtype), model.config.block_size

    @torch.no_grad()
    def run() -> Tokens:
        idx = prompt
        for _ in range(new):
            x = sdpa.hidden(idx[:, -T:])[:, -1]  # (B, C)
            idx = torch.cat([idx, sdpa.lm_head(x).argmax(-1, keepdim=True)], dim=1)
        return idx[:, prompt.shape[1] :].tolist()

    return run


def sdpa_cache(model: GPT, dtype: str, prompt: Tensor, new: int) -> Generate:
    """Eager torch with keys and values kept in tensors of their final size."""
    sdpa: Any = sdpa_model(model, dtype)
    config = model.config
    B, length = prompt.shape
    H, D = config.n_head, config.head_dim

    def attend(attention: Any, x: Tensor, cache: Tensor, start: int) -> Tensor:
        t = x.shape[1]
        q, k, v = attention.c_attn(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        cache[0, :, :, start : start + t], cache[1, :, :, start : start + t] = k, v
        keys, values = cache[:, :, :, : start + t]  # (B, H, start + t, D) each
        y = F.scaled_dot_product_attention(q, keys, values, is_causal=t > 1)
        return attention.c_proj(y.transpose(1, 2).flatten(2))

    def step(idx: Tensor, caches: Tensor, start: int) -> Tensor:
        x = sdpa.wte(idx) + sdpa.wpe(torch.arange(start, start + idx.shape[1]))
        for block, cache in zip(sdpa.h, caches, strict=True):
            x = x + attend(block.attn, block.ln_1(x), cache, start)
            x = x + block.mlp(block.ln_2(x))
        return sdpa.lm_head(sdpa.ln_f(x[:, -1])).argmax(-1, keepdim=True)  # (B, 1)

    @torch.no_grad()
    def run() -> Tokens:
        size = (config.n_layer, 2, B, H, length + new, D)
        caches = torch.empty(size, dtype=DTYPES[dtype])
        idx, out, start = prompt, [], 0
        for _ in range(new):
            token = step(idx, caches, start)
            out.append(token)
            start, idx = start + idx.shape[1], token
        return torch.cat(out, dim=1).tolist()

    return run


def installed(module: str) -> bool:
    """Whether a peer can be imported: `pip install -e .[peers]` brings them."""
    return importlib.util.find_spec(module) is not None


def transformers_model(model: GPT) -> nn.Module:
    """GPT2LMHeadModel with these weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    config = GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.block_size,
        n_embd=c.n_embd,
        n_layer=c.n_layer,
        n_head=c.n_head,
        activation_function="gelu_new" if c.gelu == "tanh" else "gelu",
        tie_word_embeddings=c.tie_weights,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    other = GPT2LMHeadModel(config).eval()
    weights = {}
    for name, weight in model.state_dict().items():
        transposed = name.endswith("weight") and (".c_" in name)  # Conv1D keeps (K, N)
        place = name if name.startswith("lm_head") else f"transformer.{name}"
        weights[place] = weight.t().contiguous() if transposed else weight
    missing, unexpected = other.load_state_dict(weights, strict=False)
    assert not unexpected and not [name for name in missing if "attn.bias" not in name]
    return other


def transformers_generate(model: GPT, dtype: str, prompt: Tensor, new: int) -> Generate:
    """transformers' generate, which keeps a cache."""
    other: Any = transformers_model(model).to(DTYPES[dtype])
    mask = torch.ones_like(prompt)

    @torch.no_grad()
    def run() -> Tokens:
        out = other.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        return out[:, prompt.shape[1] :].tolist()

    return run


def ctranslate2_generate(model: GPT, compute_type: str, prompt: Tensor, new: int) -> Generate:
    """CTranslate2 with the number of threads that torch has, all on one batch."""
    import ctranslate2
    from ctranslate2.specs import transformer_spec

    c = model.config
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        c.n_layer,
        c.n_head,
        pre_norm=True,
        activation=(
            ctranslate2.specs.Activation.GELUTanh
            if c.gelu == "tanh"
            else ctranslate2.specs.Activation.GELU
        ),
        no_final_norm=False,
    )
    _fill_ctranslate2(spec, model)
    vocabulary = [str(i) for i in range(c.vocab_size)]
    spec.register_vocabulary(vocabulary)
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = vocabulary[0]
    spec.validate()
    spec.optimize(quantization=compute_type)
    folder = Path(tempfile.mkdtemp())
    spec.save(str(folder))
    other = ctranslate2.Generator(
        str(folder), compute_type=compute_type, intra_threads=torch.get_num_threads()
    )
    shutil.rmtree(folder)
    texts = [[vocabulary[token] for token in row] for row in prompt.tolist()]

    def run() -> Tokens:
        results = other.generate_batch(
            texts,
            max_length=new,
            min_length=new,
            sampling_topk=1,
            include_prompt_in_result=False,
            max_batch_size=len(texts),
            end_token=[],
        )
        return [result.sequences_ids[0] for result in results]

    weakref.finalize(run, other.unload_model)
    return run


def _fill_ctranslate2(spec: Any, original: GPT) -> None:
    decoder, model = spec.decoder, copy.deepcopy(original)  # it quantises in place

    def linear(to: Any, source: nn.Linear) -> None:
        to.weight = source.weight.detach()
        if source.bias is not None:
            to.bias = source.bias.detach()

    def norm(to: Any, source: nn.LayerNorm) -> None:
        to.gamma = source.weight.detach()
        to.beta = source.bias.detach()

    decoder.scale_embeddings = False
    decoder.embeddings.weight = model.wte.weight.detach()
    decoder.position_encodings.encodings = model.wpe.weight.detach()
    norm(decoder.layer_norm, model.ln_f)
    linear(decoder.projection, model.lm_head)
    for to, block in zip(decoder.layer, model.blocks, strict=True):
        norm(to.self_attention.layer_norm, block.ln_1)
        linear(to.self_attention.linear[0], block.attn.c_attn)
        linear(to.self_attention.linear[1], block.attn.c_proj)
        norm(to.ffn.layer_norm, block.ln_2)
        linear(to.ffn.linear_0, block.mlp.c_fc)
        linear(to.ffn.linear_1, block.mlp.c_proj)
