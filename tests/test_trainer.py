"""The trainer: a step, the evaluation, its random numbers, models inside wrappers."""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small_models import assert_same_weights, small_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from training_steps import FUSED, TEXT, losses_of, quick

from gptfast import checkpoint
from gptfast.config import TrainConfig
from gptfast.errors import ConfigError, DataError
from gptfast.model import GPT
from gptfast.tokenizer import CharTokenizer
from gptfast.training import Trainer, evaluate

# ---- one step and the evaluation


def test_a_step_is_torchs_adamw_on_the_models_loss():
    # In float64, because AdamW normalises even gradients that consist only of rounding errors.
    model, other = small_model(dropout=0.0).double(), small_model(dropout=0.0).double()
    trainer = Trainer(model, TrainConfig(lr=1e-2, clip=0.1, weight_decay=0.5, betas=(0.8, 0.9)))
    adamw = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.5, betas=(0.8, 0.9))
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        idx, targets = torch.randint(1, 5, (2, 4, 8), generator=generator).unbind()
        loss = trainer.step(idx, targets)
        expected = torch.nn.functional.cross_entropy(other(idx).flatten(0, 1), targets.flatten())
        adamw.zero_grad()
        expected.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        adamw.step()
        assert loss.shape == () and not loss.requires_grad
        torch.testing.assert_close(loss, expected.detach(), check_dtype=False)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert not model.wte.weight[0].any()


class CountOps(TorchDispatchMode):
    """Counts the operators that torch runs, except detach."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.detach.default:
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


@FUSED
@pytest.mark.parametrize(
    "options", [{}, {"precision": "bf16"}, {"decayed": "matrices", "ema": 0.99}]
)
def test_a_step_runs_few_operators(options):
    """An operator costs microseconds, which matter for small models; new ones must fail here."""
    trainer = Trainer(small_model(n_layer=2), TrainConfig(clip=1.0, **options))
    idx = torch.ones(4, 8, dtype=torch.int64)
    trainer.step(idx, idx)  # creates AdamW's state
    with CountOps() as mode:
        trainer.step(idx, idx)
    once = ["embedding", "embedding_backward", "linear_cross_entropy", "adamw_"]
    per_layer = ["self_attention", "self_attention_backward", "ffn", "ffn_backward"]
    allowed = Counter(
        {f"gptfast::{name}": 1 for name in once} | {f"gptfast::{name}": 2 for name in per_layer}
    )
    allowed += Counter(
        {
            "aten::randint.generator": 1,  # the dropout's key
            "aten::ones_like": 1,  # the gradient of the loss
            "aten::_local_scalar_dense": 1,  # checks whether that gradient is 1
        }
    )
    assert mode.counts["gptfast::adamw_"] == 1
    assert mode.counts - allowed == Counter()


def test_labels_are_smoothed_in_training_alone():
    idx, targets = torch.randint(1, 5, (2, 4, 8), generator=torch.Generator().manual_seed(1))
    model = small_model(dropout=0.0)
    smoothed = model.loss(idx, targets, label_smoothing=0.2).item()
    evaluated = evaluate(model, idx[0]).loss
    trainer = Trainer(model, TrainConfig(label_smoothing=0.2))
    assert trainer.evaluate(idx[0]).loss == evaluated
    assert trainer.step(idx, targets).item() == smoothed != evaluate(model, idx[0]).loss


def test_a_step_trains_with_dropout_whatever_mode_the_model_was_in():
    trainer = Trainer(small_model(dropout=0.5).eval(), TrainConfig(lr=1e-9))
    idx = torch.ones(4, 8, dtype=torch.int64)
    assert trainer.step(idx, idx) != trainer.step(idx, idx)


@pytest.mark.parametrize("tokens", [2, 8, 9, 10, 41])
def test_evaluation_is_the_mean_over_all_tokens_of_disjoint_windows(tokens, monkeypatch):
    monkeypatch.setattr(
        "gptfast.training.evaluation.EVAL_TOKENS_AT_ONCE", 16
    )  # two windows at once
    model = small_model(dropout=0.5)
    ids = torch.randint(1, 5, (tokens,), generator=torch.Generator().manual_seed(1))
    result = evaluate(model, ids)
    assert model.training  # the mode is restored
    model.eval()
    total = 0.0
    for start in range(0, tokens - 1, 8):
        x, y = ids[start : start + 8][: tokens - 1 - start], ids[start + 1 : start + 9]
        log_p = model(x[None])[0].detach().double().log_softmax(-1)
        total -= log_p[torch.arange(len(y)), y].sum().item()
    assert result.tokens == tokens - 1
    assert result.loss == pytest.approx(total / (tokens - 1), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


@pytest.mark.parametrize("ids", [torch.ones(1).long(), torch.ones(9), torch.ones(3, 9).long()])
def test_evaluation_refuses_what_is_no_text(ids):
    with pytest.raises(DataError, match="1-D tensor of at least 2 tokens"):
        evaluate(small_model(), ids)
    with pytest.raises(ConfigError, match="'fp32', 'bf16'.*'half'"):
        evaluate(small_model(), torch.ones(9).long(), "half")


def test_weights_in_half_precision_are_refused():
    with pytest.raises(ConfigError, match="float32 weights.*got bfloat16"):
        Trainer(small_model().bfloat16(), TrainConfig())


def test_a_model_of_which_nothing_is_trained_is_refused():
    with pytest.raises(ConfigError, match="nothing to train: all parameters .* frozen"):
        Trainer(small_model().requires_grad_(False), TrainConfig())
    with pytest.raises(ConfigError, match=r"expected a GPT, .*got a Linear"):
        Trainer(torch.nn.Linear(2, 2), TrainConfig())


# ---- random numbers


@pytest.mark.parametrize(
    "options", [{}, {"init": "gpt2"}, {"tie_weights": True}, {"bias": False, "attention": False}]
)
def test_initial_weights_are_drawn_from_a_generator(options):
    expected = small_model(seed=3, **options)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    drawn = GPT(expected.config, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_weights(drawn, expected)


def test_a_loss_takes_the_key_of_its_dropout():
    model, idx = small_model(dropout=0.5), torch.ones(4, 8, dtype=torch.int64)
    before = torch.get_rng_state()
    losses = [model.loss(idx, idx, seed=seed) for seed in (5, torch.tensor(5), 6)]
    assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(model(idx, targets=idx, seed=5), losses[0])
    assert torch.equal(model(idx, seed=5), model(idx, seed=5))
    torch.manual_seed(1)
    drawn = model.loss(idx, idx)  # from torch's default generator
    torch.manual_seed(1)
    assert model.loss(idx, idx) == drawn != model.loss(idx, idx)


def test_a_trainers_random_numbers_are_its_own():
    idx = torch.ones(4, 8, dtype=torch.int64)
    found = []
    for seed in (1, 2):
        trainer = Trainer(small_model(dropout=0.5), TrainConfig(seed=3))
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append([trainer.step(idx, idx).item() for _ in range(3)])
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]


@pytest.mark.parametrize("backend", [pytest.param("fused", marks=FUSED), "reference"])
def test_runs_in_several_threads_are_those_of_each_alone(backend):
    seeds = (1, 1, 2)
    options = {"backend": backend, "steps": 30, "dropout": 0.3}
    alone = {seed: quick(seed=seed, **options) for seed in set(seeds)}
    before = torch.get_rng_state()
    with ThreadPoolExecutor(len(seeds)) as pool:
        together = list(pool.map(lambda seed: quick(seed=seed, **options), seeds))
    assert torch.equal(torch.get_rng_state(), before)
    for seed, result in zip(seeds, together, strict=True):
        assert losses_of(result.history) == losses_of(alone[seed].history)
        assert_same_weights(result.model, alone[seed].model)


# ---- models inside wrappers


class CountedForwards(torch.nn.DataParallel):
    """Counts calls of `forward`, which without a GPU only calls the model."""

    def __init__(self, module):
        super().__init__(module)
        self.calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


@pytest.mark.parametrize(
    "wrap",
    [CountedForwards, lambda m: torch.compile(m, backend="eager")],
    ids=["DataParallel", "torch.compile"],
)
def test_a_wrapped_model_trains_as_it_does_alone(tmp_path, wrap):
    ids = CharTokenizer.from_text(TEXT).encode_tensor(TEXT)
    config = TrainConfig(lr=1e-2, batch_size=8, steps=6, eval_every=3)
    alone = Trainer(small_model(), config).fit(ids[:1000], ids[1000:])
    wrapped = wrap(small_model())
    result = Trainer(wrapped, config).fit(ids[:1000], ids[1000:], out=tmp_path / "run")
    assert type(result.model) is GPT and not wrapped.training
    assert losses_of(result.history) == losses_of(alone.history)
    assert_same_weights(checkpoint.load(tmp_path / "run")[0], alone.model)
    assert evaluate(wrapped, ids[1000:]).loss == result.history[-1]["val_loss"]
    assert getattr(wrapped, "calls", 6) == 6  # each step's forward is the wrapper's
    resumed = Trainer(wrap(small_model(seed=5)), TrainConfig(**{**vars(config), "steps": 9}))
    longer = resumed.fit(ids[:1000], ids[1000:], out=tmp_path / "run", resume=True)
    assert losses_of(longer.history)[:2] == losses_of(alone.history)


def test_gradients_of_several_processes_meet(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed part")
    idx = torch.randint(1, 5, (4, 8), generator=torch.Generator().manual_seed(1))
    expected = small_model()
    Trainer(expected, TrainConfig()).step(idx, idx)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    try:
        wrapped, reduced = DistributedDataParallel(small_model()), []

        def note(state, bucket):
            reduced.append(bucket.buffer().numel())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        wrapped.register_comm_hook(None, note)
        Trainer(wrapped, TrainConfig()).step(idx, idx)
    finally:
        torch.distributed.destroy_process_group()
    assert sum(reduced) == sum(param.numel() for param in expected.parameters())
    assert_same_weights(wrapped.module, expected)
