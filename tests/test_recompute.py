"""Blocks that are computed once more in the backward pass: the same bits from less memory."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from gptfast import GPT, BackendError, GPTConfig, TrainConfig, Trainer, generate
from gptfast.ops import select
from gptfast.tokenizer import CharTokenizer

if select.unavailable("cpu", torch.float32):
    pytest.skip("needs the compiled extension", allow_module_level=True)

CONFIG = GPTConfig(block_size=9, vocab_size=7, n_layer=2, n_embd=16, dropout=0.3)
IDX = torch.randint(7, (3, 9), generator=torch.Generator().manual_seed(1))
BLOCK = ("self_attention", "ffn")


def make(recompute: bool, backend: Any = "auto", **options: Any) -> GPT:
    config = replace(CONFIG, **options)
    model = GPT(config, backend, generator=torch.Generator().manual_seed(3))
    model.recompute = recompute
    return model


def loss_and_grads(model: Any, bf16: bool = False) -> list[Tensor]:
    """The loss of IDX and its gradients, which are forgotten."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(IDX, targets=IDX, seed=5)
    loss.backward()
    found = [loss.detach(), *(param.grad for param in model.parameters())]
    model.zero_grad()
    return found


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Ran(TorchDispatchMode):
    """Counts the kernels that run, and watches what those of a block return beside the result."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.kept: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("gptfast::")
        self.counts[name] += 1
        results = func(*args, **(kwargs or {}))
        if name in BLOCK:
            self.kept += [StorageWeakRef(x.untyped_storage()) for x in results[1:]]
        return results


@pytest.mark.parametrize("bf16", (False, True))
@pytest.mark.parametrize("backend", ("fused", "reference"))
def test_gradients_have_the_same_bits(backend: str, bf16: bool) -> None:
    plainly, again = (loss_and_grads(make(x, backend=backend), bf16) for x in (False, True))
    assert_same(plainly, again)


def test_each_block_runs_once_more_in_the_backward_pass_and_keeps_nothing_before() -> None:
    for recompute in (False, True):
        model = make(recompute)
        with Ran() as forward:
            loss = model.loss(IDX, IDX)
        assert forward.kept and all(each.expired() is recompute for each in forward.kept)
        with Ran() as backward:
            loss.backward()
        for name in BLOCK:
            assert (forward.counts[name], backward.counts[name]) == (2, 2 * recompute)
            assert backward.counts[f"{name}_backward"] == 2
        assert backward.counts["embedding"] == backward.counts["linear_cross_entropy"] == 0
    with Ran() as inference, torch.no_grad():
        model(IDX)
    assert all(inference.counts[name] == 2 for name in BLOCK)


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_a_run_has_the_same_bits_also_resumed_without(tmp_path: Any, precision: Any) -> None:
    ids = torch.randint(7, (200,), generator=torch.Generator().manual_seed(2))
    config = TrainConfig(steps=6, eval_every=3, batch_size=4, clip=1.0, precision=precision)
    found = []
    for recompute in (False, True):
        each = replace(config, recompute=recompute)
        out = tmp_path / str(recompute)
        Trainer(make(False), replace(each, steps=3)).fit(ids, ids[:50], out=out)
        resumed = Trainer(make(False), replace(each, recompute=not recompute))
        assert resumed.gpt.recompute is not recompute
        result = resumed.fit(ids, ids[:50], out=out, resume=True)
        rows = [(row["train_loss"], row["val_loss"]) for row in result.history]
        found.append((rows, list(result.model.parameters())))
    assert found[0][0] == found[1][0] and len(found[0][0]) == 2
    assert_same(found[0][1], found[1][1])


def test_a_compiled_model_is_whole_and_recomputes() -> None:
    torch._dynamo.reset()
    model, plainly = make(True, n_layer=1), make(False, n_layer=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(loss_and_grads(compiled), loss_and_grads(plainly))
    loss = compiled(IDX, targets=IDX, seed=5)
    with Ran() as backward:
        loss.backward()
    assert all(backward.counts[name] == 1 for name in BLOCK)


def test_within_distributed_data_parallel(tmp_path: Any) -> None:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed part")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = make(True)
        assert_same(loss_and_grads(DistributedDataParallel(model)), loss_and_grads(make(False)))
    finally:
        torch.distributed.destroy_process_group()


class Noisy(nn.Module):
    """A layer of a user's own, which draws from torch's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.inner(x), 0.5)


def test_layers_and_hooks_of_the_users_own() -> None:
    found = []
    for recompute in (False, True):
        model = make(recompute)
        torch.manual_seed(4)
        model.h[1].attn = Noisy()
        called: list[int] = []
        model.h[0].register_forward_hook(lambda *args, called=called: called.append(1))
        found.append(loss_and_grads(model))
        assert len(called) == 1
        torch.rand(1)
    assert_same(*found)


def test_weights_that_are_others_in_the_backward_pass_are_refused() -> None:
    message = "with recompute the weights of h.1 must be the same in the backward pass"
    model = make(True)
    loss = model.loss(IDX, IDX)
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight.add_(1.0)
    with pytest.raises(BackendError, match=message):
        loss.backward()
    doubled = {
        name: (2 * param.detach()).requires_grad_() for name, param in model.named_parameters()
    }
    options = {"targets": IDX, "seed": 5}
    with pytest.raises(BackendError, match=message):
        torch.func.functional_call(model, doubled, (IDX,), options).backward()


def test_transforms_and_generation_do_without() -> None:
    plainly, model = make(False), make(True)
    expected = loss_and_grads(plainly)[1:]
    params = dict(model.named_parameters())

    def loss(params: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(model, params, (IDX,), {"targets": IDX, "seed": 5})

    assert_same(list(torch.func.grad(loss)(params).values()), expected)
    options: Any = {"tokenizer": CharTokenizer.from_text("abcdef"), "max_new_tokens": 9, "seed": 1}
    texts = [generate(each.eval(), ["a"], **options)[0].text for each in (plainly, model)]
    assert texts[0] == texts[1]
