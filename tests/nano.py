"""nanoGPT's model as its checkpoints describe it, in plain torch: what our files are held to."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Norm(nn.Module):
    """A LayerNorm whose bias is optional."""

    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    """One packed projection to q, k and v; the matrix of attention is made."""

    def __init__(self, n_embd: int, n_head: int, bias: bool) -> None:
        super().__init__()
        self.n_head = n_head
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for part in self.c_attn(x).split(C, dim=2)
        )
        scores = q @ k.transpose(-2, -1) / (C // self.n_head) ** 0.5
        later = torch.ones(T, T, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        return self.c_proj((weights @ v).transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    """Two layers around the exact GELU."""

    def __init__(self, n_embd: int, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
        self.c_proj = nn.Linear(4 * n_embd, n_embd, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c_fc(x)
        return self.c_proj(y * (1 + torch.erf(y / 2**0.5)) / 2)


class Layer(nn.Module):
    """A block of the residual stream."""

    def __init__(self, n_embd: int, n_head: int, bias: bool) -> None:
        super().__init__()
        self.ln_1, self.attn = Norm(n_embd, bias), Attention(n_embd, n_head, bias)
        self.ln_2, self.mlp = Norm(n_embd, bias), FeedForward(n_embd, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """The model of a checkpoint's `model_args`; evaluation alone, so without dropout."""

    def __init__(
        self,
        *,
        block_size: int,
        vocab_size: int,
        n_layer: int,
        n_head: int,
        n_embd: int,
        bias: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.block_size = block_size
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(vocab_size, n_embd),
            "wpe": nn.Embedding(block_size, n_embd),
            "h": nn.ModuleList(Layer(n_embd, n_head, bias) for _ in range(n_layer)),
            "ln_f": Norm(n_embd, bias),
        })  # fmt: skip
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight
        for param in self.parameters():  # biases and norms that matter
            nn.init.normal_(param, mean=float(param.dim() < 2), std=0.2)

    def forward(self, idx: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, V) logits."""
        parts = self.transformer
        x = parts["wte"](idx) + parts["wpe"](torch.arange(idx.shape[1]))
        for layer in parts["h"]:
            x = layer(x)
        return self.lm_head(parts["ln_f"](x))

    @torch.no_grad()
    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The likeliest next ids, one after the other, from the last window."""
        new: list[int] = []
        for _ in range(count):
            window = torch.tensor([(ids + new)[-self.block_size :]])
            new.append(int(self(window)[0, -1].argmax()))
        return new

    def optimizer(self) -> torch.optim.AdamW:
        """AdamW with a group of matrices, which decay, and one of vectors, which do not."""
        params = list(self.parameters())
        groups = [
            {"params": [param for param in params if param.dim() >= 2], "weight_decay": 0.1},
            {"params": [param for param in params if param.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95))
