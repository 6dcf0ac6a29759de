"""What this GPU reaches: bytes copied and bfloat16 products, in medians."""

from typing import Any

import torch

from gpu.measure import DEVICE, emit, kernel_seconds

COPIED_BYTES = 4 << 30
SIZE = 8192


def main() -> None:
    """Emits GB/s of a large copy, reads and writes counted, and TFLOP/s of a large product."""
    x = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    copy = kernel_seconds(lambda: y.copy_(x))
    a, b = (torch.randn(SIZE, SIZE, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = kernel_seconds(lambda: torch.mm(a, b))
    row: dict[str, Any] = {"name": f"copy of {COPIED_BYTES >> 30} GiB, product of {SIZE}^3"}
    emit(row | {"gb_s": 2e-9 * COPIED_BYTES / copy, "tflops": 2e-12 * SIZE**3 / product})
