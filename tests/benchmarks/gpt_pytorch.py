"""A GPT in plain PyTorch, as one would write it by hand: pre-norm blocks, learned positions, erf GELU, tied output layer."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class Block(nn.Module):
    """One layer, `[B, L, D] -> [B, L, D]`."""

    def __init__(self, width: int, heads: int, bias: bool):
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width, bias=bias)
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)
        self.norm_ffn = nn.LayerNorm(width, bias=bias)
        self.up = nn.Linear(width, 4 * width, bias=bias)
        self.down = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x):
        """Attention, then the feed-forward network, each added to the stream."""
        rows, length, width = x.shape
        q, k, v = self.qkv(self.norm_attention(x)).split(width, 2)
        q, k, v = (a.view(rows, length, self.heads, -1).transpose(1, 2) for a in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(rows, length, width)
        x = x + self.output(mixed)
        return x + self.down(F.gelu(self.up(self.norm_ffn(x))))


class GPT(nn.Module):
    """`tokens [B, L] -> logits [B, L, V]`."""

    def __init__(self, *, depth: int, width: int, heads: int, length: int, vocabulary: int, bias: bool = True):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.layers = nn.ModuleList(Block(width, heads, bias) for _ in range(depth))
        self.norm = nn.LayerNorm(width, bias=bias)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                deviation = 0.02 / math.sqrt(2 * depth) if name.endswith(("output.weight", "down.weight")) else 0.02
                nn.init.normal_(parameter, std=deviation)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens):
        """The logits."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        return self.norm(x) @ self.tokens.weight.T


def adamw(model: nn.Module, learning_rate: float, *, betas, weight_decay: float, fused: bool) -> torch.optim.AdamW:
    """AdamW that decays matrices and tables and leaves vectors alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)
