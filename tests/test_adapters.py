"""Models with modules that are not plain layers: hooks, parametrisations, `peft` adapters."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import gptfast
from gptfast import GPT, BackendError, ConfigError, GPTConfig, TrainConfig, Trainer, plain
from gptfast.formats import huggingface
from gptfast.generation.reference_loop import ReferenceLoop
from gptfast.modules import ForwardContext
from gptfast.ops import reference
from gptfast.ops.random import dropout_factors

CONFIG = GPTConfig(
    block_size=12, vocab_size=11, n_layer=2, n_head=2, n_embd=32, dropout=0.0, padding_idx=None
)
BACKENDS = ("auto", "reference")
IDX = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(2))
TARGETS = IDX.roll(-1, 1)


class RmsNorm(nn.Module):
    """A custom norm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, size))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.scale


class Gate(nn.Linear):
    """A subclass of Linear with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class Attention(nn.Module):
    """A custom sublayer, which receives only the norm's output."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1) / 7


class TableWithoutWeight(nn.Module):
    """A custom embedding without `weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(11, 32))

    def forward(self, idx: Tensor) -> Tensor:
        return self.rows[idx]


def double(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 2


def own_forward(layer: nn.Module) -> None:
    inner = layer.forward
    layer.forward = lambda x: inner(x) * 3  # type: ignore[method-assign]


def normed(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)
    layer.parametrizations.weight.original0.data *= 3  # changes the weight


def reinit(layer: nn.Module, **values: Any) -> None:
    vars(layer).update(values)


def replace(path: str, make: Callable[[], nn.Module]) -> Callable[[GPT], None]:
    return lambda model: model.set_submodule(path, make())


def change(path: str, how: Callable[[Any], Any]) -> Callable[[GPT], None]:
    def apply(model: GPT) -> None:
        how(model.get_submodule(path))

    return apply


def padded() -> nn.Embedding:
    return nn.Embedding(12, 32, padding_idx=3)


# Changes that users make to a model, with a pattern of the message that names the module.
ODD: dict[str, tuple[Callable[[GPT], None], str]] = {
    "rms norm": (replace("h.0.ln_1", lambda: RmsNorm(32)), "h.0.ln_1 is a .*RmsNorm"),
    "rms norm 2": (replace("h.1.ln_2", lambda: RmsNorm(32)), "h.1.ln_2 is a .*RmsNorm"),
    "rms norm f": (replace("ln_f", lambda: RmsNorm(32)), "ln_f is a .*RmsNorm"),
    "no affine": (
        replace("ln_f", lambda: nn.LayerNorm(32, elementwise_affine=False)),
        "ln_f has no weight",
    ),
    "eps": (change("h.1.ln_1", lambda ln: reinit(ln, eps=0.3)), "h.1.ln_1 has another eps"),
    "eps 2": (change("h.0.ln_2", lambda ln: reinit(ln, eps=0.3)), "h.0.ln_2 has another eps"),
    "eps f": (change("ln_f", lambda ln: reinit(ln, eps=0.3)), "ln_f has another eps"),
    "norm of all": (
        replace("ln_f", lambda: nn.LayerNorm((9, 32))),
        "ln_f normalises over more than the last",
    ),
    "head bias": (
        replace("lm_head", lambda: nn.Linear(32, 11, bias=True)),
        "lm_head has a bias",
    ),
    "subclass": (replace("h.0.mlp.c_fc", lambda: Gate(32, 128)), "h.0.mlp.c_fc is a .*Gate"),
    "own attention": (replace("h.1.attn", Attention), "h.1.attn is a .*Attention"),
    "own mlp": (
        replace("h.0.mlp", lambda: nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32))),
        "h.0.mlp is a torch.nn.modules.container.Sequential",
    ),
    "own embedding": (replace("wte", TableWithoutWeight), "wte is a .*TableWithoutWeight"),
    "max_norm": (change("wte", lambda wte: reinit(wte, max_norm=0.5)), "wte has a max_norm"),
    "sparse": (change("wpe", lambda wpe: reinit(wpe, sparse=True)), "wpe has sparse=True"),
    "padded positions": (replace("wpe", padded), "wpe has a padding_idx"),
    "forward": (change("h.0.attn.c_proj", own_forward), "h.0.attn.c_proj has a forward of its own"),
    "weight_norm": (
        change("h.0.attn.c_attn", normed),
        "h.0.attn.c_attn is a .*ParametrizedLinear",
    ),
    "prune": (
        change("h.1.mlp.c_proj", lambda x: prune.random_unstructured(x, "weight", amount=0.5)),
        "h.1.mlp.c_proj has hooks",
    ),
}  # fmt: skip
for _path in (
    "wte", "wpe", "h.0.ln_1", "h.0.attn", "h.0.attn.c_attn", "h.1.attn.c_proj", "h.1.ln_2",
    "h.1.mlp", "h.1.mlp.c_fc", "h.0.mlp.c_proj", "ln_f", "lm_head",
):  # fmt: skip
    ODD[f"hook {_path}"] = (
        change(_path, lambda module: module.register_forward_hook(double)),
        f"{_path} has hooks",
    )


def make(backend: str = "auto", config: GPTConfig = CONFIG) -> GPT:
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 1:
                param.normal_(1.0, 0.3)
    model.backend = backend  # type: ignore[assignment]
    return model


def plain_torch(model: GPT, idx: Tensor, key: Tensor | None = None, p: float = 0.0) -> Tensor:
    """Logits by the model's modules and attention in plain torch; `key` is the dropout key."""

    def dropped(x: Tensor, stream: int, matrices: int = 1) -> Tensor:
        if key is None:
            return x
        rows = x.numel() // x.shape[-1] // matrices
        factors = dropout_factors(p, key, stream, matrices, rows, x.shape[-1])
        return x * factors.reshape(x.shape).to(x)

    B, T = idx.shape
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    x = dropped(model.wte(idx) + model.wpe(torch.arange(T)), 0)
    for layer, block in enumerate(model.blocks):
        y = block.ln_1(x)
        if isinstance(block.attn, Attention):
            x = x + block.attn(y)
        else:
            q, k, v = block.attn.c_attn(y).view(B, T, 3, 2, 16).permute(2, 0, 3, 1, 4)
            scores = (q @ k.transpose(-1, -2) / 4).masked_fill(hidden, -torch.inf).softmax(-1)
            out = dropped(scores, 1 + 2 * layer, 2 * B) @ v
            out = block.attn.c_proj(out.transpose(1, 2).flatten(2))
            x = x + (double(block, None, out) if block.attn._forward_hooks else out)
        y = block.ln_2(x)
        if isinstance(block.mlp, nn.Sequential):
            y = block.mlp(y)
        else:
            y = block.mlp.c_proj(F.gelu(block.mlp.c_fc(y)))
            y = double(block, None, y) if block.mlp._forward_hooks else y
        x = x + dropped(y, 2 + 2 * layer)
    return model.lm_head(model.ln_f(x))


def expected(model: GPT, **dropout: Any) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Logits, loss and gradients in plain torch."""
    logits = plain_torch(model, IDX, **dropout)
    loss = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())
    params = [param for param in model.parameters() if param.requires_grad]
    return (
        logits.detach(),
        loss.detach(),
        list(torch.autograd.grad(loss, params, allow_unused=True)),
    )


def dense(x: Tensor) -> Tensor:
    return x.to_dense() if x.is_sparse else x


def assert_equals_plain_torch(model: GPT, **dropout: Any) -> None:
    logits, loss, grads = expected(model, **dropout)
    if not dropout:
        parts = model(IDX, return_intermediates=True)
        torch.testing.assert_close(model(IDX), logits, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(parts.logits, logits, atol=2e-5, rtol=2e-5)
    torch.manual_seed(5)
    own = model.loss(IDX, TARGETS)
    torch.testing.assert_close(own.detach(), loss, atol=1e-5, rtol=1e-5)
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    found = torch.autograd.grad(own, list(trained.values()), allow_unused=True)
    for name, a, b in zip(trained, found, grads, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            torch.testing.assert_close(
                dense(a), dense(b), atol=2e-5, rtol=2e-4, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ODD)
def test_what_is_no_plain_layer_is_called(name: str, backend: str) -> None:
    model, before = make(backend), make(backend)(IDX)
    ODD[name][0](model)
    if name not in ("padded positions", "sparse"):  # these do not change the logits
        assert not torch.allclose(model(IDX), before, atol=1e-3)
    assert_equals_plain_torch(model)


@pytest.mark.parametrize("name", ODD)
def test_explicit_kernels_refuse_it_by_name(name: str) -> None:
    model = make("fused")
    ODD[name][0](model)
    message = ODD[name][1]
    for call in (model, lambda idx: model.loss(idx, idx)):
        with pytest.raises(BackendError, match=f"plain layers, and {message}.*backend='auto'"):
            call(IDX)
    with pytest.raises(BackendError, match=f"generate: .*plain layers, and {message}"):
        gptfast.generate(model, [[1]], max_new_tokens=1)
    with pytest.raises(BackendError, match=f"score: .*plain layers, and {message}"):
        gptfast.score(model, [[1, 2]])
    with pytest.raises(BackendError, match=f"pack: .*plain layers, and {message}"):
        gptfast.pack(model)
    with pytest.raises(ConfigError, match=f"dtype='int8' .* plain layers, and {message}"):
        model.backend = "reference"
        gptfast.generate(model, [[1]], max_new_tokens=1, dtype="int8")


GENERATED = ("rms norm", "eps f", "head bias", "weight_norm", "prune", "own embedding", "forward")


@pytest.mark.parametrize("name", (*GENERATED, "hook h.0.attn.c_attn", "own attention"))
def test_generate_and_score_call_it_and_warn(name: str) -> None:
    model = make().eval()
    ODD[name][0](model)
    model(IDX)  # weight_norm and prune store a non-leaf tensor in the module
    with pytest.warns(UserWarning, match=f"generate: .*{ODD[name][1]}.*without a cache") as caught:
        (result,) = gptfast.generate(model, [[1, 2]], max_new_tokens=15, temperature=0)
    assert len(caught) == 1 and caught[0].filename == __file__
    tokens = [1, 2]
    for _ in range(15):
        tokens.append(int(plain_torch(model, torch.tensor([tokens[-12:]]))[0, -1].argmax()))
    assert result.tokens == tokens[2:]
    with pytest.warns(UserWarning, match=f"score: .*{ODD[name][1]}") as caught:
        (scored,) = gptfast.score(model, [tokens[:13]])
    assert len(caught) == 1 and caught[0].filename == __file__
    logprobs = plain_torch(model, torch.tensor([tokens[:12]])).log_softmax(-1)[0]
    wanted = [logprobs[t, tokens[t + 1]].item() for t in range(12)]
    assert scored.logprobs == pytest.approx(wanted, abs=1e-4)
    with pytest.warns(UserWarning, match="generate: "):
        pieces = list(gptfast.stream(model, [1, 2], max_new_tokens=15, temperature=0))
    assert [token for piece in pieces for token in piece] == result.tokens
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.backend = "reference"
        (alone,) = gptfast.generate(model, [[1, 2]], max_new_tokens=15, temperature=0)
    assert alone.tokens == result.tokens
    assert alone.logprobs == pytest.approx(result.logprobs, abs=1e-5)


def test_a_plain_model_generates_with_the_engine_and_without_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ReferenceLoop, "run", lambda *_: pytest.fail("not by the engine"))
    model, tokens = make("fused").eval(), [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (result,) = gptfast.generate(model, [tokens], max_new_tokens=2, temperature=0)
    for _ in range(2):
        tokens.append(int(plain_torch(model, torch.tensor([tokens]))[0, -1].argmax()))
    assert result.tokens == tokens[1:]


def test_hooks_that_watch_generation_are_the_users_own() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def hook(self, module: nn.Module, args: Any, out: Tensor) -> None:
            self.seen.append(out.shape[1])

    model, recorder = make(), Recorder()
    model.h[1].attn.c_attn.register_forward_hook(recorder.hook)
    with pytest.warns(UserWarning, match="h.1.attn.c_attn has hooks"):
        gptfast.generate(model, [[1, 2]], max_new_tokens=3)
    assert recorder.seen == [2, 3, 4]


@pytest.mark.parametrize("backend", ("auto", "fused", "reference"))
def test_hooks_on_blocks_and_model_are_called_and_stop_no_kernel(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = make(backend), []
    for module in (model, *model.h):
        module.register_forward_pre_hook(lambda module, args: seen.append(type(module).__name__))
        module.register_full_backward_hook(lambda *args: seen.append("backward"))
    for kind in (nn.Linear, nn.LayerNorm, nn.Embedding):
        monkeypatch.setattr(kind, "forward", None)  # fails if any is called
    model(IDX).sum().backward()
    assert seen == ["GPT", "Block", "Block"] + 3 * ["backward"]


@pytest.mark.parametrize("path", ("", "h.1"))
def test_generation_by_the_engine_would_overlook_hooks_on_blocks(path: str) -> None:
    model = make()
    before = gptfast.generate(model, [[1]], max_new_tokens=9, temperature=0)
    module = model.get_submodule(path)
    module.register_forward_hook(lambda module, args, out: out.roll(1, -1))
    name = path or "the model"
    with pytest.warns(UserWarning, match=f"{name} has forward hooks"):
        assert gptfast.generate(model, [[1]], max_new_tokens=9, temperature=0) != before
    with pytest.raises(BackendError, match=f"pack: .*{name} has forward hooks"):
        gptfast.pack(model)


def test_generation_knows_the_configs_shapes_and_class_alone() -> None:
    class Shifted(GPT):
        def forward(self, idx: Tensor, **options: Any) -> Any:
            return super().forward(idx, **options).roll(1, -1)

    wide, short, heads, gelu = make(), make(), make(), make()
    wide.h[0].mlp.c_fc, wide.h[0].mlp.c_proj = nn.Linear(32, 64), nn.Linear(64, 32)
    short.h = short.h[:1]
    heads.h[1].attn.n_head = 4
    gelu.h[0].mlp.gelu = "tanh"
    torch.manual_seed(0)
    for model, message in (
        (wide, r"h.0.mlp.c_fc has a weight of shape \(64, 32\), not \(128, 32\)"),
        (short, "h has 1 blocks, not 2"),
        (heads, "h.1.attn has n_head=4, not 2"),
        (gelu, "h.0.mlp has gelu='tanh', not 'erf'"),
        (Shifted(CONFIG), "Shifted has a forward of its own"),
    ):
        with pytest.warns(UserWarning, match=message):
            (result,) = gptfast.generate(model.eval(), [[1, 2]], max_new_tokens=1, temperature=0)
        assert result.tokens == [int(model(torch.tensor([[1, 2]]))[0, -1].argmax())]
        with pytest.raises(BackendError, match=f"pack: .*{message}"):
            gptfast.pack(model)


@pytest.mark.parametrize("change", ({"n_head": 4}, {"gelu": "tanh"}))
def test_an_option_that_is_set_on_a_module_holds(change: dict[str, Any]) -> None:
    idx = torch.randint(CONFIG.vocab_size, (3, CONFIG.block_size))
    for backend in BACKENDS:
        expected = make(backend, GPTConfig(**CONFIG.to_dict() | change))
        model = make(backend)
        for block in model.blocks:
            half = block.attn if "n_head" in change else block.mlp
            vars(half).update(change)
        assert torch.equal(model(idx), expected(idx))
        assert not torch.equal(model(idx), make(backend)(idx))


DROPPED = ("rms norm", "rms norm 2", "hook wte", "weight_norm", "head bias", "hook h.1.mlp")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DROPPED)
def test_dropout_has_the_masks_of_the_kernels(name: str, backend: str) -> None:
    model = make(backend, GPTConfig(**CONFIG.to_dict() | {"dropout": 0.3}))
    ODD[name][0](model)
    torch.manual_seed(5)
    key = torch.randint(2**62, (), dtype=torch.int64)  # the same draw as in the model
    assert_equals_plain_torch(model, key=key, p=0.3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_observing_hooks_see_the_activations_and_change_no_result(backend: str) -> None:
    model, seen = make(backend).eval(), {}
    wanted = model(IDX)

    def observer(name: str) -> Callable[..., None]:
        return lambda module, args, out: seen.__setitem__(name, (args[0], out))

    names = [
        name
        for name, module in model.named_modules()
        if name and not isinstance(module, nn.ModuleList) and name not in ("h.0", "h.1")
    ]
    for name in names:
        model.get_submodule(name).register_forward_hook(observer(name))
    torch.testing.assert_close(model(IDX), wanted, atol=1e-5, rtol=1e-5)
    assert set(seen) == set(names) and len(names) == 20
    for name, (x, out) in list(seen.items()):
        layer = model.get_submodule(name)
        torch.testing.assert_close(out, layer.forward(x), atol=1e-6, rtol=1e-5)
    assert torch.equal(seen["lm_head"][1], model(IDX))


def test_gradient_hooks_on_layers_fire() -> None:
    model, seen = make(), []
    model.h[0].mlp.c_fc.register_full_backward_hook(lambda module, dx, dy: seen.append(dy[0].shape))
    model.loss(IDX, TARGETS).backward()
    assert seen == [(3, 9, 128)]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_reaches_called_layers(backend: str, dtype: torch.dtype) -> None:
    model, plain_model = make(backend), make(backend)
    for path in ("wte", "h.0.attn.c_attn", "h.1.mlp", "lm_head"):
        model.get_submodule(path).register_forward_hook(lambda *args: None)
    with torch.autocast("cpu", dtype):
        assert model(IDX).dtype == dtype
        loss, wanted = model.loss(IDX, TARGETS), plain_model.loss(IDX, TARGETS)
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss.item() - wanted.item()) < 0.02
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_called_layers_of_another_dtype_keep_the_activations_own() -> None:
    class Widened(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x.float(), self.weight.float(), self.bias.float())

    model = make().bfloat16()
    wanted = model(IDX)
    layer = Widened(32, 96).bfloat16()
    layer.load_state_dict(model.h[0].attn.c_attn.state_dict())
    model.h[0].attn.c_attn = layer
    assert model(IDX).dtype == torch.bfloat16
    torch.testing.assert_close(model(IDX), wanted, atol=0.1, rtol=0.05)


def test_attention_weights_are_those_of_the_called_layers() -> None:
    model = make()
    first = model.attention_weights(IDX)
    model.h[1].attn.c_attn.register_forward_hook(lambda module, args, out: out * 0)
    found = model.attention_weights(IDX)
    assert torch.equal(found[0], first[0])
    even = torch.ones(9, 9).tril() / torch.arange(1, 10)[:, None]
    torch.testing.assert_close(found[1], even.expand(3, 2, 9, 9))
    model.h[1].attn = Attention()
    with pytest.raises(ConfigError, match="h.1.attn must be a CausalSelfAttention, got Attention"):
        model.attention_weights(IDX)


def test_parts_compute_by_themselves() -> None:
    block, x = make().blocks[0], torch.randn(2, 5, 32)
    q, k, v = block.attn.c_attn(x).view(2, 5, 3, 2, 16).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(block.attn(x), block.attn.c_proj(out))
    torch.testing.assert_close(block.mlp(x), block.mlp.c_proj(F.gelu(block.mlp.c_fc(x))))
    tanh = make(config=GPTConfig(**CONFIG.to_dict() | {"gelu": "tanh"})).blocks[0].mlp
    wanted = tanh.c_proj(F.gelu(tanh.c_fc(x), approximate="tanh"))
    torch.testing.assert_close(tanh(x), wanted)


def test_a_compiled_model_calls_what_is_not_plain() -> None:
    torch._dynamo.reset()
    model = make(config=GPTConfig(**CONFIG.to_dict() | {"n_layer": 1})).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(IDX)
    ODD["eps f"][0](model)  # after the compilation
    torch.testing.assert_close(compiled(IDX), plain_torch(model, IDX), atol=2e-5, rtol=2e-5)


def test_what_stands_in_for_parameters_is_plain() -> None:
    model = make("fused").eval()
    halved = {name: param.detach() / 2 for name, param in model.named_parameters()}
    wanted = copy.deepcopy(model)
    wanted.load_state_dict(halved)
    assert torch.equal(torch.func.functional_call(model, halved, (IDX,)), wanted(IDX))
    with torch._subclasses.FakeTensorMode():
        assert GPT(CONFIG, backend="fused")(torch.zeros(2, 3, dtype=torch.int64)).shape == (
            2,
            3,
            11,
        )


def test_a_weight_that_is_a_tensor_of_its_own_kind_is_not_plain() -> None:
    class Quantised(Tensor):
        pass

    layer = nn.Linear(3, 3)
    assert plain.linear(layer) is None
    layer.weight = nn.Parameter(torch.zeros(3, 3).as_subclass(Quantised))
    assert plain.linear(layer) == "has a weight that is a Quantised"


def test_hooks_for_all_modules_watch_the_kernels() -> None:
    model, seen = make("fused"), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(type(module).__name__)
    )
    try:
        model(IDX)
    finally:
        handle.remove()
    assert seen == ["Block", "Block", "GPT"]


def test_what_is_called_drops_out_in_float32() -> None:
    """1 / 0.9 is no bfloat16: rounded before the sum, the result would be 0."""
    context = ForwardContext(reference, 0.1, torch.tensor(3))
    y = torch.ones(1, 4, 8, dtype=torch.bfloat16)
    x = torch.full_like(y, -1.109375)  # the bfloat16 next to it
    kept = context.added(x, y, 1) > -1.0
    factor = 65536 / (65536 - round(65536 * 0.1))
    assert 0 < kept.sum() < kept.numel()
    found = context.added(x, y, 1)[kept].double()
    torch.testing.assert_close(found, torch.full_like(found, factor - 1.109375), rtol=0.01, atol=0)


@pytest.fixture
def peft() -> Any:
    """The package peft; skips the test if it is not installed."""
    return pytest.importorskip("peft", reason="pip install 'gptfast-kernels[adapters]'")


@pytest.mark.parametrize("backend", BACKENDS)
def test_lora_trains_and_its_base_stays(peft: Any, backend: str) -> None:
    model = make(backend, GPTConfig(**CONFIG.to_dict() | {"dropout": 0.1}))
    base = {name: param.detach().clone() for name, param in model.named_parameters()}
    names = ["c_attn", "c_proj", "c_fc"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names))
    before = model.eval()(IDX)
    trainer = Trainer(model, TrainConfig(lr=0.02))
    losses = [trainer.step(IDX, TARGETS).item() for _ in range(30)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    frozen = {
        name.replace(".base_layer", ""): param
        for name, param in model.named_parameters()
        if "lora_" not in name
    }
    assert frozen.keys() == base.keys()
    assert all(torch.equal(frozen[name], base[name]) for name in base)
    assert all(
        param.abs().sum() > 0 for name, param in model.named_parameters() if "lora_B" in name
    )
    model.eval()
    assert_equals_plain_torch(model)
    logits = adapted(IDX)
    assert not torch.allclose(logits, before, atol=1e-2)
    with pytest.raises(BackendError, match="h.0.attn.c_attn is a peft.tuners.lora.layer.Linear"):
        model.backend = "auto"
        gptfast.pack(model)
    with adapted.disable_adapter():
        torch.testing.assert_close(model(IDX), before, atol=1e-5, rtol=1e-5)
    merged = adapted.merge_and_unload()
    merged.backend = "fused"  # merged: the layers are plain again
    torch.testing.assert_close(merged(IDX), logits, atol=1e-4, rtol=1e-4)
    gptfast.pack(merged)


def test_an_imported_model_with_lora_is_merged_exported_and_generates(
    peft: Any, tmp_path: Path
) -> None:
    fields = {"gelu": "tanh", "tie_weights": True, "attn_proj_dropout": True, "dropout": 0.1}
    huggingface.write(make("auto", GPTConfig(**CONFIG.to_dict() | fields)), None, tmp_path / "gpt2")
    model, _ = gptfast.load(tmp_path / "gpt2")
    before = model(IDX)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"]))
    trainer = Trainer(model, TrainConfig(lr=0.02))
    losses = [trainer.step(IDX, TARGETS).item() for _ in range(30)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    merged = adapted.merge_and_unload().eval()
    assert not torch.allclose(merged(IDX), before, atol=1e-2)
    gptfast.export(merged, None, tmp_path / "tuned", to="hf")
    again, _ = gptfast.load(tmp_path / "tuned")
    assert torch.equal(again(IDX), merged(IDX))
    texts = []
    for backend in ("fused", "reference"):
        again.backend = backend
        texts.append(gptfast.generate(again, IDX.tolist(), max_new_tokens=20, temperature=0))
    assert [each.tokens for each in texts[0]] == [each.tokens for each in texts[1]]


def test_lora_in_the_embedding_and_a_trained_head(peft: Any) -> None:
    model = make()
    options = {"target_modules": ["wte"], "modules_to_save": ["lm_head"]}
    peft.get_peft_model(model, peft.LoraConfig(r=4, **options))
    for name, param in model.named_parameters():
        if "lora_embedding_B" in name:
            nn.init.normal_(param)
    assert_equals_plain_torch(model)


class SilentGPT(GPT):
    """Overrides a method that the engine does not use."""

    def embed(self, idx: Tensor, step: Any) -> Tensor:
        return super().embed(idx, step) * 0


def test_a_subclass_with_a_method_of_its_own_is_not_taken_for_a_gpt() -> None:
    model = SilentGPT(GPTConfig(block_size=8, vocab_size=5, n_embd=8)).eval()
    with pytest.warns(UserWarning, match="SilentGPT has a embed of its own"):
        (scored,) = gptfast.score(model, [[1, 2, 3, 4]])
    logprobs = model(torch.tensor([[1, 2, 3]])).log_softmax(-1)[0, range(3), [2, 3, 4]]
    assert scored.logprobs == pytest.approx(logprobs.tolist(), abs=1e-5)
