"""The model against torch's own modules with the same weights: logits, loss and gradients."""

import copy
import json
import math
from dataclasses import asdict, replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from peers import CourseGPT
from torch import Tensor
from torch.nn import functional as F

from gptfast import GPT, BackendError, ConfigError, GPTConfig
from gptfast.config import TrainConfig
from gptfast.formats.course import from_state_dict, own_name
from gptfast.model import unwrapped
from gptfast.ops.sampling import Sampling
from gptfast.presets import PRESETS
from gptfast.testing import assert_budget

DTYPES = (torch.float32, torch.bfloat16)
SMALL = GPTConfig(block_size=20, vocab_size=11, n_layer=2, n_head=2, n_embd=32, dropout=0.0)


def course_pair(config: GPTConfig) -> tuple[CourseGPT, GPT]:
    """Makes the course's model from a fixed seed, and ours with the same weights."""
    torch.manual_seed(1)
    course = CourseGPT(config)
    with torch.no_grad():  # nonzero, because torch initialises biases to zero
        for name, param in course.named_parameters():
            if name.endswith("bias"):
                param.normal_(std=0.2)
    # A state dict does not contain the dropout, so both models are compared without.
    return course.eval(), from_state_dict(course.state_dict(), config.n_head).eval()


def tokens(config: GPTConfig, B: int, T: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    idx = torch.randint(config.vocab_size, (B, T + 1), generator=generator)
    return idx[:, :-1], idx[:, 1:]


def test_course_model_has_400128_parameters() -> None:
    config = PRESETS["abc"].override({"vocab_size": 5}).model
    assert sum(param.numel() for param in GPT(config).parameters()) == 400_128


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "n_head", "n_embd", "attention"),
    (
        (1, 2, 32, True),
        (17, 8, 128, True),
        (100, 2, 128, True),
        (33, 1, 128, True),
        (17, 2, 32, False),
    ),
)
def test_logits_loss_and_gradients_equal_the_course_model(
    isa: str, T: int, n_head: int, n_embd: int, attention: bool, dtype: torch.dtype
) -> None:
    config = GPTConfig(
        block_size=100,
        vocab_size=13,
        n_head=n_head,
        n_embd=n_embd,
        dropout=0.0,
        attention=attention,
    )
    course, model = course_pair(config)
    course, model = course.to(dtype), model.to(dtype)
    oracle_model = copy.deepcopy(course).double()
    idx, targets = tokens(config, 3, T)
    names = [own_name(name) for name, _ in course.named_parameters()]

    def torch_results(module: CourseGPT) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Returns logits, loss per token, and gradients of the mean in the order of `names`."""
        logits = module(idx)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none")
        grads = torch.autograd.grad(losses.mean(), list(module.parameters()))
        return logits.detach(), losses.detach(), list(grads)

    logits, loss = model(idx).detach(), model.loss(idx, targets)
    grads = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
    own, oracle = torch_results(course), torch_results(oracle_model)
    assert_budget("logits", logits, own[0], oracle[0], 2.0)
    # Errors of tokens can cancel in the mean by chance, so torch's error is the mean of theirs.
    own_error = (own[1].double() - oracle[1]).abs().mean().item()
    rounding = torch.finfo(torch.float32).eps * oracle[1].mean().item()
    assert abs(loss.item() - oracle[1].mean().item()) <= 2 * (own_error + rounding)
    for name, a, t, o in zip(names, grads, own[2], oracle[2], strict=True):
        assert_budget(name, a, t.to(dtype), o.double(), 3.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_embd", (96, 640))
def test_rows_have_the_bits_they_have_alone(isa: str, n_embd: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = GPTConfig(block_size=20, vocab_size=70, n_head=2, n_embd=n_embd)
    model = GPT(config).eval().to(dtype)
    idx, _ = tokens(config, 5, 19)
    together = model(idx)
    for count in (1, 2):
        torch.set_num_threads(count)
        for row in range(5):
            assert torch.equal(model(idx[row : row + 1])[0], together[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("everywhere", (False, True))
def test_fused_equals_reference_with_dropout_on(
    isa: str, everywhere: bool, dtype: torch.dtype
) -> None:
    config = GPTConfig(
        block_size=40,
        vocab_size=13,
        n_head=2,
        n_embd=64,
        dropout=0.3,
        attn_proj_dropout=everywhere,
    )
    torch.manual_seed(0)
    model = GPT(config).to(dtype)
    idx, targets = tokens(config, 4, 37)
    results = []
    for backend in ("fused", "reference"):
        model.backend = backend
        torch.manual_seed(5)
        loss = model.loss(idx, targets)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    tolerance = 2e-5 if dtype == torch.float32 else 0.04
    for fused, plain in zip(*results, strict=True):
        assert (fused - plain).abs().max() <= tolerance * max(plain.abs().max().item(), 0.05)


def test_the_output_of_attention_drops_out_where_the_config_says_so() -> None:
    config = GPTConfig(block_size=8, vocab_size=7, n_embd=16, dropout=0.5)
    model = GPT(config)
    everywhere = GPT(replace(config, attn_proj_dropout=True))
    everywhere.load_state_dict(model.state_dict())
    idx, targets = tokens(config, 2, 8)
    losses = [each.loss(idx, targets, seed=3).item() for each in (model, everywhere)]
    assert losses[0] != losses[1]
    called = copy.deepcopy(everywhere)
    for block in called.h:  # a hook makes the block call its modules
        block.attn.register_forward_hook(lambda *_: None)
    assert called.loss(idx, targets, seed=3).item() == pytest.approx(losses[1], rel=1e-5)
    streams = [(block.stream, block.stream + 1, block.proj_stream) for block in everywhere.blocks]
    assert len({0, *chain.from_iterable(streams)}) == 1 + 3 * config.n_layer
    for each in (model, everywhere):
        each.eval()
    assert torch.equal(model(idx), everywhere(idx))


def test_dropout_changes_with_torch_seed_alone() -> None:
    model = GPT(GPTConfig(block_size=8, vocab_size=7, n_embd=16, dropout=0.5))
    idx, targets = tokens(model.config, 2, 8)
    torch.manual_seed(3)
    first, second = model.loss(idx, targets).item(), model.loss(idx, targets).item()
    torch.manual_seed(3)
    assert model.loss(idx, targets).item() == first != second
    model.eval()
    assert model.loss(idx, targets).item() == model.loss(idx, targets).item()


def test_padding_embedding_stays_zero_and_untrained() -> None:
    model = GPT(SMALL)
    idx, targets = tokens(SMALL, 2, 20)
    model.loss(idx.where(idx > 2, 0), targets).backward()
    assert (model.wte.weight[0] == 0).all()
    assert model.wte.weight.grad is not None and (model.wte.weight.grad[0] == 0).all()


def test_loss_ignores_targets() -> None:
    model = GPT(SMALL)
    idx, targets = tokens(SMALL, 2, 20)
    masked = targets.clone()
    masked[:, :5] = -100
    logits = model(idx)[:, 5:]
    expected = F.cross_entropy(logits.flatten(0, 1), targets[:, 5:].flatten())
    assert torch.allclose(model.loss(idx, masked), expected, atol=1e-5)


def test_intermediates() -> None:
    model = GPT(SMALL).eval()
    idx, _ = tokens(SMALL, 2, 9)
    parts = model(idx, return_intermediates=True)
    assert parts.positions.tolist() == list(range(9))
    assert parts.mask.tolist() == [[key <= query for key in range(9)] for query in range(9)]
    assert parts.hidden.shape == (2, 9, 32)
    assert torch.equal(parts.logits, model(idx))
    assert torch.allclose(F.linear(parts.hidden, model.lm_head.weight), parts.logits, atol=1e-5)


def test_attention_weights_are_those_of_multihead_attention() -> None:
    course, model = course_pair(SMALL)
    idx, _ = tokens(SMALL, 2, 12)
    weights = model.attention_weights(idx)
    assert weights.shape == (2, 2, 2, 12, 12)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 2, 2, 12))
    assert (weights.triu(1) == 0).all()
    x = course.wte(idx) + course.wpe(torch.arange(12))
    y = course.scale1[0](x)
    mask = torch.ones(12, 12, dtype=torch.bool).triu(1)
    _, expected = course.MM[0](y, y, y, attn_mask=mask, average_attn_weights=False)
    assert torch.allclose(weights[0], expected, atol=1e-6)
    with pytest.raises(ConfigError, match="has no attention weights"):
        GPT(GPTConfig(vocab_size=66, attention=False)).attention_weights(idx)


def test_initial_values_are_those_of_torch_modules() -> None:
    config = GPTConfig(vocab_size=500, n_embd=128)
    torch.manual_seed(0)
    model = GPT(config)
    block = model.blocks[0]
    assert abs(model.wte.weight[1:].std().item() - 1) < 0.02  # N(0, 1)
    bound = math.sqrt(6 / (128 + 3 * 128))  # Xavier over the packed projection
    assert 0.98 * bound < block.attn.c_attn.weight.abs().max().item() <= bound
    assert (block.attn.c_attn.bias == 0).all() and (block.attn.c_proj.bias == 0).all()
    for linear, inputs in (
        (block.mlp.c_fc, 128),
        (block.mlp.c_proj, 512),
        (block.attn.c_proj, 128),
    ):
        assert 0.98 / math.sqrt(inputs) < linear.weight.abs().max().item() <= 1 / math.sqrt(inputs)
    gpt2 = GPT(GPTConfig(vocab_size=500, n_layer=8, init="gpt2"))
    assert abs(gpt2.wte.weight[1:].std().item() - 0.02) < 0.001 and (gpt2.wte.weight[0] == 0).all()
    assert abs(gpt2.blocks[0].mlp.c_proj.weight.std().item() - 0.005) < 0.0003
    assert (gpt2.blocks[0].mlp.c_fc.bias == 0).all()


def test_tied_weights_share_one_tensor_and_both_gradients() -> None:
    model = GPT(
        GPTConfig(block_size=8, vocab_size=9, n_embd=16, tie_weights=True, padding_idx=None)
    )
    assert model.lm_head.weight is model.wte.weight
    idx, targets = tokens(model.config, 2, 8)
    results = []
    for backend in ("fused", "reference"):
        model.backend = backend
        torch.manual_seed(1)
        results.append(torch.autograd.grad(model.loss(idx, targets), model.wte.weight)[0])
    assert torch.allclose(*results, atol=1e-5)


def test_autocast_computes_in_bfloat16_with_float32_gradients() -> None:
    model = GPT(SMALL)
    idx, targets = tokens(SMALL, 2, 20)
    plain = model.loss(idx, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(idx).dtype == torch.bfloat16
        loss = model.loss(idx, targets)
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss.item() - plain.item()) < 0.02
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_compiled_model_gives_the_same_logits() -> None:
    torch._dynamo.reset()
    model = GPT(SMALL).eval()
    idx, targets = tokens(SMALL, 2, 20)
    assert torch.equal(torch.compile(model, fullgraph=True)(idx), model(idx))


def test_compiled_reference_gives_the_same_logits() -> None:
    torch._dynamo.reset()
    model = GPT(SMALL, backend="reference").eval()
    idx, _ = tokens(SMALL, 2, 20)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(idx), model(idx))


def test_auto_follows_autocast_to_a_dtype_without_kernels() -> None:
    model = GPT(SMALL)
    idx, _ = tokens(SMALL, 2, 20)
    with torch.autocast("cpu", torch.float16):
        assert model(idx).dtype == torch.float16


@pytest.mark.slow
def test_compiled_loss_has_the_same_gradients() -> None:
    torch._dynamo.reset()
    model = GPT(SMALL)
    idx, targets = tokens(SMALL, 2, 20)
    params = list(model.parameters())
    plain = torch.autograd.grad(model.loss(idx, targets), params)
    compiled = torch.compile(model.loss, fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(idx, targets), params), plain, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_label_smoothing_with_a_head_that_is_called() -> None:
    model = GPT(SMALL).eval()
    idx, targets = tokens(SMALL, 2, 20)
    targets = targets.clone()
    targets[0, :5] = -100
    logits = model(idx).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), label_smoothing=0.2)
    fused = model.loss(idx, targets, label_smoothing=0.2)
    model.lm_head.register_forward_hook(lambda *args: None)
    called = model.loss(idx, targets, label_smoothing=0.2)
    torch.testing.assert_close(torch.stack([fused, called]), torch.stack([expected, expected]))


def test_explicit_backend_never_falls_back() -> None:
    model = GPT(SMALL).double()
    idx, _ = tokens(SMALL, 2, 5)
    assert model(idx).dtype == torch.float64  # auto selects the reference
    model.backend = "fused"
    with pytest.raises(BackendError, match="float32 and bfloat16, not float64"):
        model(idx)
    with pytest.raises(
        ConfigError, match="backend must be 'auto', 'fused' or 'reference', got 'gpu'"
    ):
        model.backend = "gpu"


def test_bad_tokens_are_errors() -> None:
    model = GPT(SMALL)
    with pytest.raises(ValueError, match="at most block_size=20 positions, got 21"):
        model(torch.zeros(1, 21, dtype=torch.int64))
    with pytest.raises(ValueError, match="at most block_size=20 positions, got 21"):
        model.attention_weights(torch.zeros(1, 21, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(B, T\) int64 tensor, got \(5,\)"):
        model(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"idx must be in \[0, 11\), got 11"):
        model(torch.full((1, 3), 11))


@pytest.mark.parametrize(
    ("fields", "message"),
    (
        (
            {"n_embd": 30, "n_head": 4},
            "n_embd must be divisible by n_head, got n_embd=30 and n_head=4",
        ),
        ({"block_size": 0}, "block_size must be a positive whole number, got 0"),
        ({"n_layer": True}, "n_layer must be a positive whole number, got True"),
        ({"n_head": 2.0}, "n_head must be a positive whole number, got 2.0"),
        ({"n_embd": np.array([8])}, r"n_embd must be a positive whole number, got array"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": "0"}, r"dropout must be in \[0, 1\), got '0'"),
        ({"bias": "no"}, "bias must be True or False, got 'no'"),
        ({"gelu": "relu"}, "gelu must be one of"),
        (
            {"vocab_size": 66, "padding_idx": 66},
            r"padding_idx must be None or in \[0, 66\), got 66",
        ),
        (
            {"vocab_size": 66, "padding_idx": 1.0},
            r"padding_idx must be None or in \[0, 66\), got 1.0",
        ),
    ),
)
def test_config_that_contradicts_itself_is_an_error(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPTConfig(**fields)


def test_config_takes_numpys_numbers() -> None:
    plain = GPTConfig(n_layer=3, n_embd=64, dropout=0.5, bias=False, padding_idx=1)
    fields = {"n_layer": np.int64(3), "n_embd": np.int16(64), "dropout": np.float32(0.5)}
    config = GPTConfig(**fields, bias=np.bool_(False), padding_idx=np.uint8(1))
    assert json.dumps(config.to_dict()) == json.dumps(plain.to_dict())
    assert config == plain and config.head_dim == 32
    half, tenth = np.float32(0.5), torch.tensor(0.125)
    trained = TrainConfig(lr=half, betas=(half, tenth), clip=tenth, ema=half, text_fraction=half)
    assert trained == TrainConfig(
        lr=0.5, betas=(0.5, 0.125), clip=0.125, ema=0.5, text_fraction=0.5
    ) and json.dumps(asdict(trained))
    drawn = Sampling(temperature=half, top_p=tenth, min_p=half)
    assert drawn == Sampling(temperature=0.5, top_p=0.125, min_p=0.5)


@pytest.mark.parametrize("wrong", (True, "0.5", np.array([0.5]), torch.tensor(0.5j), float("nan")))
def test_what_is_no_number_is_an_error(wrong: Any) -> None:
    for make in (
        lambda: GPTConfig(dropout=wrong),
        lambda: TrainConfig(lr=wrong),
        lambda: TrainConfig(betas=(0.9, wrong)),
        lambda: Sampling(temperature=wrong),
        lambda: Sampling(min_p=wrong),
    ):
        with pytest.raises(ConfigError, match="got .*(True|0.5|nan)"):
            make()


def test_a_model_needs_the_size_of_its_vocabulary() -> None:
    with pytest.raises(ConfigError, match="a GPT needs a number for vocab_size, got None: gptfast"):
        GPT(GPTConfig())
    with pytest.raises(ConfigError, match=r"in \[0, vocab_size\), got -1"):
        GPTConfig(padding_idx=-1)


def test_config_survives_its_dict() -> None:
    config = GPTConfig(n_layer=5, gelu="tanh", padding_idx=None)
    assert GPTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="has no field 'n_heads'; it has block_size, "):
        GPTConfig.from_dict({"n_heads": 2})


# ---- models inside wrappers


def test_a_model_is_found_inside_its_wrappers():
    model = GPT(GPTConfig(block_size=4, vocab_size=5, n_layer=1, n_head=1, n_embd=8))
    parallel = torch.nn.DataParallel
    for wrapped in (
        model,
        torch.compile(model),
        parallel(model),
        torch.compile(parallel(model)),
        parallel(torch.compile(model)),
    ):
        assert unwrapped(wrapped) is model


def test_what_holds_no_model_is_named():
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="expected a GPT, .* got a Linear$"):
        unwrapped(linear)
    with pytest.raises(ConfigError, match="got a OptimizedModule around a Linear$"):
        unwrapped(torch.compile(linear))
    with pytest.raises(ConfigError, match="got a dict$"):
        unwrapped({})
