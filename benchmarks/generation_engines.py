"""Greedy generation by CTranslate2 and llama.cpp from the weights of a gptfast model.

Contenders as in generation_peers.py; some of them run in a process of their own. Letters: B batch,
T time, C n_embd, H heads, D head_dim, V vocab_size, L layers.
"""

import contextlib
import copy
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
import torch
from generation_peers import Generate, Tokens
from torch import Tensor, nn

from gptfast import GPT
from gptfast.ops.reference import LAYER_NORM_EPS


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
