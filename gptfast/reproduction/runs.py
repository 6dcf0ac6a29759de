"""Trains the exercises, run by run, and writes the report."""

import sys
from pathlib import Path
from typing import Any

import torch

from gptfast.checks import check_count
from gptfast.data import shakespeare
from gptfast.errors import ConfigError
from gptfast.generation import generate
from gptfast.model import Backend
from gptfast.ops import select
from gptfast.pictures import check_picture
from gptfast.reproduction.exercises import EXERCISES, Reproduction, Trained
from gptfast.reproduction.report import PICTURES, write_report
from gptfast.training import TrainResult, preset, train
from gptfast.training.distributed import is_one_of_several
from gptfast.training.run import STATE_NAME

PROMPT, CHARACTERS, TEMPERATURE = "MARCIUS: ", 2000, 0.8


def reproduce(
    out: str | Path,
    *,
    seeds: int = 3,
    text: str | None = None,
    data: str | Path | None = None,
    backend: Backend = "auto",
    device: str | torch.device = "cpu",
    progress: bool = True,
    **overrides: Any,
) -> Reproduction:
    """Trains the course's exercises, samples from the models, and writes `report.md`.

    Each run has a directory in `out`. One that is finished is kept, one that was interrupted goes
    on, so an interrupted reproduction goes on by the same call.

    Args:
        out: The directory of the report, its pictures and the runs.
        seeds: How many times each exercise is trained: by the seeds 0, 1, ..., `seeds` - 1.
        text: Another text than Tiny Shakespeare.
        data: A file with Tiny Shakespeare, instead of a download.
        backend: As for `train`; the runs of the reference have directories of their own.
        device: As for `train`.
        progress: As for `train`.
        **overrides: Other values for fields of GPTConfig and TrainConfig, for a test.

    Raises:
        ConfigError: `seeds` is wrong, torchrun has started several processes, matplotlib is
            missing, or see `train`.
        DataError: `data` is another text, or see `train`.
        CheckpointError, UnsavedError, TrainError: As by `train`.
    """
    if is_one_of_several():
        raise ConfigError("reproduce runs in one process, torchrun has started several")
    out = Path(out)
    seeds = check_count("seeds", seeds, 1)
    for name in PICTURES.values():
        check_picture(out / name)  # now rather than after hours
    if data is not None:
        shakespeare(data)
    plain = backend == "reference" or bool(
        select.unavailable(torch.device(device).type, torch.float32)
    )
    runs: dict[str, list[Trained]] = {exercise.preset: [] for exercise in EXERCISES}
    for seed in range(seeds):
        for name, finished in runs.items():
            folder = out / f"{name}{'-reference' * plain}-seed{seed}"
            if progress:
                print(f"{name}, seed {seed}", file=sys.stderr)
            resume = (folder / STATE_NAME).is_file()
            result = train(
                preset(name).override({**overrides, "seed": seed}),
                folder,
                text=text,
                data=data,
                backend=backend,
                device=device,
                resume=resume,
                overwrite=not resume,  # one that was killed before its first save
                progress=progress,
            )
            if result.signal is not None:
                return Reproduction(runs, None, result.signal)
            finished.append(_trained(seed, result))
    how = f"the {'reference, plain torch' if plain else 'kernels'}, on {device}"
    return Reproduction(runs, write_report(out, runs, how))


def _trained(seed: int, result: TrainResult) -> Trained:
    """Samples from a model, and keeps of its history what the report shows."""
    (sample,) = generate(
        result.model,
        [PROMPT],
        tokenizer=result.tokenizer,
        max_new_tokens=CHARACTERS,
        temperature=TEMPERATURE,
        seed=seed,
    )
    if sample.finish_reason == "interrupted":
        raise KeyboardInterrupt
    history = result.history
    return Trained(
        seed=seed,
        losses=[(row["train_loss"], row["val_loss"]) for row in history],
        seconds=history[-1]["seconds"],
        tokens_per_s=history[-1]["tokens_per_s"],
        sample=f"{PROMPT}{sample.text}",
    )
