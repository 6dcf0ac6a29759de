"""`gptfast demo`: trains the course's model, and compares it with the best possible prediction.

Letters: B batch, T block_size, N tokens of the text.
"""

import copy
import math
import statistics
import time
from dataclasses import dataclass

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from gptfast.abc_corpus import NUM_WORDS, WORDS, abc_entropy, abc_next_distribution
from gptfast.checks import check_seed
from gptfast.cli.inspection import parameter_table
from gptfast.config import TrainConfig
from gptfast.console import Console
from gptfast.data import abc_corpus, random_windows
from gptfast.generation import Generation, generate
from gptfast.model import GPT, Backend
from gptfast.ops import select
from gptfast.pictures import visible
from gptfast.presets import PRESETS
from gptfast.tokenizer import CharTokenizer
from gptfast.training import Trainer, split

PROMPT = "A"
NEW_TOKENS = 700
GOOD_LOSS = 0.275  # nats; the loss that 400 steps should reach
COMPARED_BLOCKS, STEPS_PER_BLOCK = 5, 6
LOSS_TOLERANCE = 1e-4  # per step, between the backends, which round differently


@dataclass(frozen=True)
class Speed:
    """Seconds that the reference backend and the fused one take for the same work."""

    reference: float
    fused: float
    equal: bool  # whether tokens are equal, or losses within LOSS_TOLERANCE

    @property
    def ratio(self) -> float:
        """How many times faster the fused backend was."""
        return self.reference / self.fused


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo; losses in nats per character."""

    parameters: int
    initial_loss: float
    loss: float  # on the held-out text, after training
    entropy: float  # the lowest possible loss
    next_after_a: dict[str, float]
    greedy: str  # the text of NEW_TOKENS tokens after the prompt
    sampled: str
    training: Speed | None  # None without the compiled kernels
    generation: Speed | None

    @property
    def passed(self) -> bool:
        """Whether the held-out loss is at most GOOD_LOSS."""
        return self.loss <= GOOD_LOSS


def demo(seed: int = 1, console: Console | None = None) -> DemoResult:
    """Trains the `abc` model, samples, and compares: model and source, fused and reference.

    Args:
        seed: The seed of initial weights, windows, dropout and samples.
        console: Where to print; None prints to the standard output.

    Returns:
        The results; the times depend on the machine.

    Raises:
        ConfigError: `seed` is not in [0, 2**63).
    """
    seed = check_seed(seed)
    console = console or Console(highlight=False)
    text = abc_corpus()
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode_tensor(text)  # (N,)
    _show_corpus(console, text, tokenizer)
    recipe = PRESETS["abc"].override({"seed": seed, "vocab_size": tokenizer.vocab_size})
    train_ids, val_ids = split(ids, recipe.train)
    drawn = torch.Generator().manual_seed(seed)
    untrained = GPT(recipe.model, generator=drawn)
    _section(console, "Model")
    console.print(parameter_table(untrained))
    initial_loss = _show_untrained(console, untrained, train_ids, seed)

    model = copy.deepcopy(untrained)
    _section(console, f"Training, {recipe.train.steps} steps")
    loss = _train(console, model, recipe.train, train_ids, val_ids, tokenizer)
    entropy = abc_entropy(model.config.block_size)
    _show_distance(console, loss, entropy)
    next_after_a = _show_next(console, model, tokenizer)
    comparable = not select.unavailable("cpu", torch.float32)
    greedy, generation = _generate_greedy(model, tokenizer, comparable)
    _show_text(console, "greedy", greedy)
    sampled = _sample(model, tokenizer, temperature=1.0, top_k=2, seed=seed).text or ""
    _show_text(console, "top-k 2", sampled)

    training = None
    _section(console, "Speed on this machine")
    if comparable:
        training = _compare_training(untrained, recipe.train, train_ids)
    _show_speed(console, training, generation)
    return DemoResult(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        initial_loss=initial_loss,
        loss=loss,
        entropy=entropy,
        next_after_a=next_after_a,
        greedy=greedy,
        sampled=sampled,
        training=training,
        generation=generation,
    )


def _section(console: Console, title: str) -> None:
    console.print(Text(f"\n{title}", style="bold cyan"))


def _show_corpus(console: Console, text: str, tokenizer: CharTokenizer) -> None:
    _section(console, "Corpus")
    words = ", ".join(visible(word) for word in WORDS)
    console.print(f"{len(text):,} characters: {NUM_WORDS:,} words drawn from {words}")
    console.print(Text(visible(text[:70]) + " ..."))
    vocabulary = ", ".join(f"{i + 1} {char!r}" for i, char in enumerate(tokenizer.chars))
    console.print(f"vocabulary: {tokenizer.vocab_size} ids: 0 <PAD>, {vocabulary}")


@torch.no_grad()
def _show_untrained(console: Console, model: GPT, ids: Tensor, seed: int) -> float:
    _section(console, "Before training")
    x, y = random_windows(ids, model.config.block_size, 64, torch.Generator().manual_seed(seed))
    model.eval()
    sums = model(x).softmax(-1).sum(-1)  # (B, T)
    loss = model.loss(x, y).item()
    console.print(f"the probabilities sum to 1 within {(sums - 1).abs().max().item():.0e}")
    console.print(
        f"loss {loss:.3f} nats; guessing among {model.config.vocab_size} ids at random has "
        f"ln {model.config.vocab_size} = {math.log(model.config.vocab_size):.3f}"
    )
    return loss


def _train(
    console: Console,
    model: GPT,
    train_config: TrainConfig,
    train_ids: Tensor,
    val_ids: Tensor | None,
    tokenizer: CharTokenizer,
) -> float:
    """Trains the model in place; returns its held-out loss."""
    result = Trainer(model, train_config).fit(
        train_ids, val_ids, tokenizer=tokenizer, progress=console.is_terminal
    )
    if result.interrupted:
        raise KeyboardInterrupt
    for row in result.history:
        console.print(
            f"step {row['step']}: loss {row['train_loss']:.4f} in training, with dropout; "
            f"{row['val_loss']:.4f} held out"
        )
    seconds = result.history[-1]["seconds"]
    tokens = result.history[-1]["step"] * train_config.batch_size * model.config.block_size
    console.print(f"{seconds:.1f} s, {tokens / seconds:,.0f} tokens/s")
    return result.history[-1]["val_loss"]


def _show_distance(console: Console, loss: float, entropy: float) -> None:
    console.print(
        f"best possible (the source's entropy): {entropy:.4f}; "
        f"the model: {loss - entropy:.4f} or {loss / entropy - 1:.1%} above"
    )
    if loss > GOOD_LOSS:
        console.print(f"this is worse than the {GOOD_LOSS} that is expected", style="bold red")


@torch.no_grad()
def _show_next(console: Console, model: GPT, tokenizer: CharTokenizer) -> dict[str, float]:
    idx = torch.tensor([tokenizer.encode(PROMPT)])  # (1, T)
    found = dict(
        zip(("<PAD>", *tokenizer.chars), model(idx)[0, -1].softmax(-1).tolist(), strict=True)
    )
    true = abc_next_distribution(PROMPT)
    _section(console, f"P(next | {PROMPT!r})")
    table = Table(box=None, pad_edge=False)
    for title in ("", "model", "true"):
        table.add_column(title, justify="right")
    for char, probability in found.items():
        name = repr(char) if char in true else char
        table.add_row(name, f"{probability:.4f}", f"{true.get(char, 0.0):.4f}")
    console.print(table)
    return found


def _show_text(console: Console, title: str, text: str) -> None:
    _section(console, f"{NEW_TOKENS} tokens after {PROMPT!r}, {title}")
    console.print(Text(visible(text), overflow="fold"))
    words, covered = covered_by_words(PROMPT + text)
    console.print(
        f"{words} words of the language make up {covered} of the {len(PROMPT + text)} characters"
    )


def covered_by_words(text: str) -> tuple[int, int]:
    """Finds the largest number of characters that complete words of the language can cover.

    Args:
        text: Any text; its first and last word may be incomplete.

    Returns:
        The number of words, and of the characters that they cover.
    """
    best = [(0, 0)]  # for each prefix: characters covered, words
    for end in range(1, len(text) + 1):
        options = [best[-1]]
        for word in WORDS:
            if text.endswith(word, 0, end):
                characters, words = best[end - len(word)]
                options.append((characters + len(word), words + 1))
        best.append(max(options))
    characters, words = best[-1]
    return words, characters


def _sample(
    model: GPT,
    tokenizer: CharTokenizer,
    temperature: float,
    top_k: int | None = None,
    seed: int = 0,
) -> Generation:
    return generate(
        model,
        [PROMPT],
        tokenizer=tokenizer,
        max_new_tokens=NEW_TOKENS,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    )[0]


def _generate_greedy(
    model: GPT, tokenizer: CharTokenizer, comparable: bool
) -> tuple[str, Speed | None]:
    """Generates greedily; if both backends can run, alternates between them and times both."""

    def timed(backend: Backend) -> tuple[float, Generation]:
        model.backend = backend
        start = time.perf_counter()
        result = _sample(model, tokenizer, temperature=0.0)
        return time.perf_counter() - start, result

    if not comparable:
        return timed("auto")[1].text or "", None
    reference, fused = zip(*[(timed("reference"), timed("fused")) for _ in range(3)], strict=True)
    speed = Speed(
        statistics.median(seconds for seconds, _ in reference),
        statistics.median(seconds for seconds, _ in fused),
        equal=reference[0][1].tokens == fused[0][1].tokens,
    )
    return fused[0][1].text or "", speed


def _compare_training(untrained: GPT, train_config: TrainConfig, ids: Tensor) -> Speed:
    """Trains and times two copies on the same windows, one per backend, in alternating blocks."""
    trainers = {}
    for backend in ("reference", "fused"):
        model = copy.deepcopy(untrained)
        model.backend = backend
        trainers[backend] = Trainer(model, train_config)
    windows = torch.Generator().manual_seed(train_config.seed)
    seconds: dict[str, list[float]] = {backend: [] for backend in trainers}
    losses: dict[str, list[float]] = {backend: [] for backend in trainers}
    for block in range(COMPARED_BLOCKS + 1):
        batches = [
            random_windows(ids, untrained.config.block_size, train_config.batch_size, windows)
            for _ in range(STEPS_PER_BLOCK)
        ]
        for backend, trainer in trainers.items():  # equal seeds, hence equal dropout masks
            for x, y in batches:
                start = time.perf_counter()
                losses[backend].append(trainer.step(x, y).item())
                if block > 0:  # the first block is a warm-up
                    seconds[backend].append(time.perf_counter() - start)
    pairs = zip(losses["reference"], losses["fused"], strict=True)
    return Speed(
        statistics.median(seconds["reference"]),
        statistics.median(seconds["fused"]),
        equal=max(abs(a - b) for a, b in pairs) <= LOSS_TOLERANCE,
    )


def _show_speed(console: Console, training: Speed | None, generation: Speed | None) -> None:
    if training is None or generation is None:
        console.print("all of this ran on plain torch, because the kernels cannot run here:")
        for reason in select.unavailable("cpu", torch.float32):
            console.print(f"  {reason}", markup=False)
        return
    table = Table(box=None, pad_edge=False)
    for title in ("", "plain torch", "kernels", "faster", "checked"):
        table.add_column(title, justify="left" if title in ("", "checked") else "right")
    for name, speed, check in (
        ("one training step", training, f"losses within {LOSS_TOLERANCE:g}"),
        (f"{NEW_TOKENS} greedy tokens", generation, "tokens equal"),
    ):
        times = (f"{1e3 * seconds:.1f} ms" for seconds in (speed.reference, speed.fused))
        if speed.equal:
            table.add_row(name, *times, f"{speed.ratio:.1f} x", check)
        else:
            table.add_row(name, *times, "-", f"failed: {check}")
    console.print(table)
    console.print(f"medians, both in turn; threads: {torch.get_num_threads()}")
