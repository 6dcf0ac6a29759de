"""The course's model in torch's own modules: what gptfast must equal."""

import torch
from torch import Tensor, nn

from gptfast.config import GPTConfig


class CourseGPT(nn.Module):
    """Pre-norm GPT on nn.MultiheadAttention; its weights have the course's names."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C, L = config.n_embd, config.n_layer
        self.wpe = nn.Embedding(config.block_size, C)
        self.wte = nn.Embedding(config.vocab_size, C, padding_idx=config.padding_idx)
        if config.attention:
            self.MM = nn.ModuleList(
                nn.MultiheadAttention(C, config.n_head, dropout=config.dropout, batch_first=True)
                for _ in range(L)
            )
            self.scale1 = nn.ModuleList(nn.LayerNorm(C) for _ in range(L))
        self.scale2 = nn.ModuleList(nn.LayerNorm(C) for _ in range(L))
        self.scale3 = nn.LayerNorm(C)
        self.FFN = nn.ModuleList(
            nn.Sequential(
                nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C), nn.Dropout(config.dropout)
            )
            for _ in range(L)
        )
        self.ln_f = nn.Linear(C, config.vocab_size, bias=False)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, idx: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, V) logits."""
        T = idx.shape[1]
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(T)))
        for layer, ffn in enumerate(self.FFN):
            if hasattr(self, "MM"):
                y = self.scale1[layer](x)
                x = x + self.MM[layer](y, y, y, attn_mask=hidden, need_weights=False)[0]
            x = x + ffn(self.scale2[layer](x))
        return self.ln_f(self.scale3(x))
