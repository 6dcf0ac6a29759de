"""Output projection and cross-entropy, forward and backward: gptfast against torch.

torch stores all logits; gptfast does not.

Letters: M rows, K columns, V vocab_size.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping

import peers
import torch
from command import main
from common import DTYPES, OURS, Case, Row, compare, compiled, random_tensors, wide, work
from torch import Tensor

from gptfast import ops
from gptfast.ops import reference

SHAPES = ((1024, 128, 5), (4096, 128, 66), (4096, 384, 66), (1024, 768, 50257))


def cross_entropy(
    M: int, K: int, V: int, dtype: str, others: Mapping[str, Callable[..., list[Tensor]]] = {}
) -> Case:
    """Makes the case of one shape; the logits have a variance of 1.

    Args:
        M: See above, as K and V.
        K: See above.
        V: See above.
        dtype: See `Row`.
        others: More contenders, which return loss and gradients of x, weight and targets.
    """
    x, weight = random_tensors((M, K), (V, K), dtype=dtype, scale=K**-0.25)
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(V, (M,), generator=generator, device="cpu").to(x.device)
    inputs, grad = [x, weight, targets], torch.ones(())
    contenders: dict[str, Callable[[], list[Tensor]]] = {
        OURS: work(ops.linear_cross_entropy, inputs, grad),
        "torch": work(peers.linear_cross_entropy, inputs, grad),
        "torch.compile": work(compiled(peers.linear_cross_entropy), inputs, grad),
        **{name: functools.partial(other, *inputs) for name, other in others.items()},
    }
    oracle = work(reference.linear_cross_entropy, [wide(t) for t in inputs], wide(grad))
    return compare(contenders, oracle, 3 * 2 * M * K * V, dtype, compiles=("torch.compile",))


def rows() -> Iterator[Row]:
    """Yields all rows of the script."""
    for shape in SHAPES:
        for dtype in DTYPES:
            build = functools.partial(cross_entropy, *shape, dtype)
            name = f"linear + cross-entropy {'x'.join(map(str, shape))} forward+backward"
            yield Row(name, dtype, build, quick=shape == SHAPES[0])


def run(argv: list[str] | None = None) -> int:
    """Runs the script and returns its exit code."""
    return main("cross_entropy", __doc__ or "", rows(), argv)


if __name__ == "__main__":
    sys.exit(run())
