"""Greedy generation by other engines from the weights of a gptfast model, as users call them.

Every `*_loop`, `*_cache` and `*_generate` makes a contender: a function without arguments that
returns the new tokens, (B, new) as lists. Letters: B batch, T time, C n_embd, H heads, D head_dim,
V vocab_size, L layers.
"""

import contextlib
import copy
import importlib.util
import logging
import multiprocessing
import shutil
import tempfile
import timeit
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from common import DTYPES, captured
from torch import Tensor, nn
from torch.nn import functional as F

from gptfast import GPT
from gptfast.course import from_course_name
from gptfast.ops.reference import LAYER_NORM_EPS

Tokens = list[list[int]]
Generate = Callable[[], Tokens]


def course_model(model: GPT) -> peers.CourseGPT:
    """Makes the course's model with these weights."""
    weights = model.state_dict()
    course_gpt = peers.CourseGPT(model.config).to(model.wte.weight.device)
    with torch.no_grad():
        for name, param in course_gpt.named_parameters():
            param.copy_(weights[from_course_name(name)])
    return course_gpt.eval()


def sdpa_model(model: GPT, dtype: str) -> peers.SdpaGPT:
    """Makes the SDPA model with these weights, in this dtype."""
    sdpa = peers.SdpaGPT(model.config)
    sdpa.load_state_dict(model.state_dict())
    return sdpa.to(model.wte.weight.device, DTYPES[dtype]).eval()


def course_loop(model: GPT, prompt: Tensor, new: int) -> Generate:
    """The course's loop: every step computes the whole window and all its logits."""
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
    """nanoGPT's loop: every step computes the whole window, but only the last token's logits."""
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
    """Eager torch with a cache of keys and values, allocated at its final size."""
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
        positions = torch.arange(start, start + idx.shape[1], device=idx.device)
        x = sdpa.wte(idx) + sdpa.wpe(positions)
        for block, cache in zip(sdpa.h, caches, strict=True):
            x = x + attend(block.attn, block.ln_1(x), cache, start)
            x = x + block.mlp(block.ln_2(x))
        return sdpa.lm_head(sdpa.ln_f(x[:, -1])).argmax(-1, keepdim=True)  # (B, 1)

    @torch.no_grad()
    def run() -> Tokens:
        size = (config.n_layer, 2, B, H, length + new, D)
        caches = torch.empty(size, dtype=DTYPES[dtype], device=prompt.device)
        idx, out, start = prompt, [], 0
        for _ in range(new):
            token = step(idx, caches, start)
            out.append(token)
            start, idx = start + idx.shape[1], token
        return torch.cat(out, dim=1).tolist()

    return run


def static_cache(model: GPT, dtype: str, prompt: Tensor, new: int) -> Generate:
    """A cache that stays where it is, and on a GPU a CUDA graph of the step: gpt-fast's way.

    A step attends to the whole cache, with a mask of the places that are filled.
    """
    sdpa: Any = sdpa_model(model, dtype)
    config, device = model.config, prompt.device
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


def transformers_model(model: GPT) -> nn.Module:
    """Makes transformers' GPT2LMHeadModel with these weights."""
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
        transposed = name.endswith("weight") and (".c_" in name)  # Conv1D stores (K, N)
        place = name if name.startswith("lm_head") else f"transformer.{name}"
        weights[place] = weight.t().contiguous() if transposed else weight
    missing, unexpected = other.load_state_dict(weights, strict=False)
    assert not unexpected and not [name for name in missing if "attn.bias" not in name]
    return other


def transformers_generate(model: GPT, dtype: str, prompt: Tensor, new: int) -> Generate:
    """transformers' generate, with its cache."""
    other: Any = transformers_model(model).to(prompt.device, DTYPES[dtype])
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


def apart(make: Callable[..., Generate], model: GPT, *arguments: Any) -> Generate:
    """Runs the contender that `make` builds in a separate process.

    Two OpenMP pools in one process have more threads than there are processors. OpenMP then stops
    spinning at barriers, and all contenders would run at half speed while both pools exist.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    copied = copy.deepcopy(model)  # pickling moves the weights to shared memory
    arguments = (there, torch.get_num_threads(), make, copied, *arguments)
    process = context.Process(target=_serve, args=arguments, daemon=True)
    process.start()
    there.close()

    def run() -> Tokens:
        here.send(None)
        tokens, error = here.recv()
        if error:
            raise RuntimeError(error)
        return tokens

    def stop() -> None:
        here.close()
        process.join()

    weakref.finalize(run, stop)
    return run


def _serve(
    there: Any, threads: int, make: Callable[..., Generate], model: GPT, *arguments: Any
) -> None:
    torch.set_num_threads(threads)
    run: Generate | None = None
    with contextlib.suppress(EOFError):  # the parent closed the pipe
        while True:
            there.recv()
            try:
                run = run or make(model, *arguments)
                there.send((run(), ""))
            except Exception as error:
                there.send(([], f"{type(error).__name__}: {error}"))


def fastest(make: Callable[[int], Generate], thread_counts: Sequence[int]) -> Generate:
    """Returns the fastest of the contenders made with these numbers of threads."""
    if len(thread_counts) == 1:
        return make(thread_counts[0])

    def seconds(run: Generate) -> float:
        return min(timeit.repeat(run, number=1, repeat=4))

    return min(map(make, thread_counts), key=seconds)


def ctranslate2_generate(
    model: GPT, compute_type: str, prompt: Tensor, new: int, threads: int
) -> Generate:
    """CTranslate2, with all threads on one batch."""
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
    other = ctranslate2.Generator(str(folder), compute_type=compute_type, intra_threads=threads)
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
    decoder, model = spec.decoder, copy.deepcopy(original)  # the conversion quantises in place

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


def llama_cpp_generate(model: GPT, kind: str, prompt: Tensor, new: int, threads: int) -> Generate:
    """llama.cpp, with one sequence per text.

    `kind` is the type of the matrices: F32, BF16 or Q8_0. Keys and values are float16, the default
    and the fastest. Its GELU is always the tanh approximation, from a float16 table, which changes
    the logits by 5e-4 of their size.
    """
    import llama_cpp

    (B, T), V = prompt.shape, model.config.vocab_size
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
    llama_cpp.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        _write_gguf(path, model, kind)
        params = llama_cpp.llama_model_default_params()
        other = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert other, "llama.cpp cannot load the model"
    options = llama_cpp.llama_context_default_params()
    options.n_seq_max, options.n_batch, options.n_ctx = B, B * T, B * (T + new)
    options.n_threads = options.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(other, options)
    assert context, "llama.cpp cannot make a context"
    memory = llama_cpp.llama_get_memory(context)
    prefill, step = _llama_batch(B, T), _llama_batch(B, 1)
    np.ctypeslib.as_array(prefill.token, (B * T,))[:] = prompt.flatten().numpy()
    tokens, positions = (np.ctypeslib.as_array(x, (B,)) for x in (step.token, step.pos))

    def decode(batch: Any) -> None:
        code = llama_cpp.llama_decode(context, batch)
        assert code == 0, f"llama_decode returns {code}"

    decode(prefill)  # from now on the logits' address is fixed
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (B, V))

    def run() -> Tokens:
        llama_cpp.llama_memory_clear(memory, False)
        out = np.empty((new, B), dtype=np.int64)
        decode(prefill)
        for i, row in enumerate(out):
            if i > 0:
                tokens[:], positions[:] = out[i - 1], T + i - 1
                decode(step)
            llama_cpp.llama_get_logits(context)  # synchronises and sorts the rows
            logits.argmax(1, out=row)
        return out.T.tolist()

    def free() -> None:
        for batch in (prefill, step):
            llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(other)

    weakref.finalize(run, free)
    return run


def _llama_batch(B: int, T: int) -> Any:
    """Makes a batch of T tokens of each of B sequences from position 0, with the last's logits."""
    import llama_cpp

    batch = llama_cpp.llama_batch_init(B * T, 0, 1)
    batch.n_tokens = B * T
    for i in range(B * T):
        sequence, position = divmod(i, T)
        batch.pos[i], batch.logits[i] = position, position == T - 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
    return batch


def _write_gguf(path: Path, model: GPT, kind: str) -> None:
    import gguf

    c = model.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(4 * c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(LAYER_NORM_EPS)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("none")
    names: Any = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, c.n_layer)
    for name, weight in model.state_dict().items():
        head = name == "lm_head.weight"
        if head and c.tie_weights:
            continue
        place = names.get_name(name if head else f"transformer.{name}", (".weight", ".bias"))
        # Norms, biases and positions are float32 in every file.
        matrix = weight.dim() == 2 and name != "wpe.weight"
        to = gguf.GGMLQuantizationType[kind if matrix else "F32"]
        writer.add_tensor(place, gguf.quantize(weight.numpy(), to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
