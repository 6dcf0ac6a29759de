"""Memory and threads of generation: budgets of the cache, peaks, calls at once."""

import mmap
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from generating import interrupted_soon, make

import gptfast
from gptfast import ConfigError, Generation
from gptfast.generation import make_request
from gptfast.generation.engine import Engine
from gptfast.ops import select


def test_one_text_that_needs_more_cache_than_there_may_be() -> None:
    model = make("odd")
    with pytest.raises(ConfigError, match=r"max_cache_bytes must hold one sequence of 37 tokens"):
        gptfast.generate(model, [[1]], max_cache_bytes=1000)
    assert len(gptfast.generate(model, [[1]], max_cache_bytes=1_000_000)[0].tokens) == 100


@pytest.mark.parametrize("overflow", ("recompute", "stop"))
@pytest.mark.parametrize("budget", (200_000, 1_000_000, 30_000_000))
def test_the_cache_stays_within_its_budget(budget: int, overflow: str) -> None:
    packed = gptfast.pack(make("odd"))
    options: dict[str, Any] = {"max_cache_bytes": budget, "overflow": overflow}
    request = make_request(packed, [[1, 2, 3]] * 300, max_new_tokens=50, **options)
    assert (
        0.6 * min(budget, 256 * packed.compiled.cache_bytes(37))
        < Engine(packed, request).cache_bytes
    )
    assert Engine(packed, request).cache_bytes <= budget


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_is_the_budget_and_what_the_texts_take() -> None:
    """Runs in a separate process, so that nothing else has raised the peak."""
    program = """
        from pathlib import Path
        import gptfast
        def kib(name):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(name))
        def generate(prompts, budget):
            gptfast.generate(packed, prompts, max_new_tokens=60, max_cache_bytes=budget)
        config = gptfast.GPTConfig(block_size=64, vocab_size=66, n_layer=2, n_head=2, n_embd=128)
        packed = gptfast.pack(gptfast.GPT(config))
        generate([[1], [2]], 1 << 20)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
        before = kib("VmRSS")
        generate([[1 + i % 60] for i in range(2000)], 16 << 20)
        print(kib("VmHWM") - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    # A token takes 24 bytes in the engine and some 100 in the result; a pass needs activations of
    # 128 rows.
    assert 16 < int(done.stdout) / 1024 < 16 + 2000 * 61 * 124 / 2**20 + 12


def test_two_threads_generate_at_once() -> None:
    model = make("odd")
    expected = [gptfast.generate(model, [[i]], max_new_tokens=200) for i in (1, 2)]
    results: dict[int, list[Generation]] = {}

    def work(i: int) -> None:
        results[i] = gptfast.generate(model, [[i]], max_new_tokens=200)

    threads = [threading.Thread(target=work, args=(i,)) for i in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[1], results[2]] == expected


@pytest.mark.skipif(select.extension() is None, reason="the engine is compiled")
def test_other_python_threads_run_meanwhile() -> None:
    model, ticks, done = make("odd"), 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.perf_counter()
    gptfast.generate(model, [[1]] * 64, max_new_tokens=300)
    seconds = time.perf_counter() - start
    done.set()
    ticker.join()
    assert ticks > 100 * seconds  # of 1,000 a second; 10 if the call held the GIL


def address_space() -> int:
    """Returns the size of this process's address space in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


@pytest.mark.skipif(select.extension() is None, reason="the engine is compiled")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux counts a process's pages")
def test_a_limit_of_billions_of_tokens_takes_the_memory_of_those_that_there_are() -> None:
    model, before = make("course"), address_space()
    options: dict[str, Any] = {"max_new_tokens": 2_000_000_000, "logprobs": 5}
    results = interrupted_soon(lambda: gptfast.generate(model, [[1], [2]], **options), 0.3)
    made = sum(len(each.tokens) for each in results)
    assert made > 0 and all(each.finish_reason == "interrupted" for each in results)
    assert all(len(each.top_logprobs) == len(each.tokens) for each in results)
    assert address_space() - before < 2**30
