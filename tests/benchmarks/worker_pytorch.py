"""A worker that trains GPT-2 in PyTorch: `python worker_pytorch.py SIZE eager|compiled huggingface|gpt`. A unit is a few steps.

It gets the best of conditions: batches that are ready in memory (a GPU's, where there is one), no data loader, no logging but one
look at the loss a unit, fused AdamW, attention through scaled_dot_product_attention, TF32 for float32 as JAX has it on GPUs, and
autocast for bfloat16.
"""

import sys

import torch
import torch.nn.functional as F
from harness import requests
from shapes import BETAS, CLIP, LEARNING_RATE, LOG_EVERY, SHAPES, WEIGHT_DECAY, Shape

BATCHES = 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def huggingface(shape: Shape) -> torch.nn.Module:
    """transformers' GPT-2 with erf GELU and without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocabulary,
        n_positions=shape.length,
        n_embd=shape.width,
        n_layer=shape.depth,
        n_head=shape.heads,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def gpt(shape: Shape) -> torch.nn.Module:
    """The plain one."""
    from gpt_pytorch import GPT

    return GPT(depth=shape.depth, width=shape.width, heads=shape.heads, length=shape.length, vocabulary=shape.vocabulary)


MODELS = {"huggingface": huggingface, "gpt": gpt}


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """`[B, L, V]` of either model."""
    out = model(tokens)
    return out if isinstance(out, torch.Tensor) else out.logits


def make_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, compute: str = "float32"):
    """A function `(tokens, targets) -> loss` that takes one optimizer step with clipped gradients."""
    parameters = list(model.parameters())

    def step(tokens, targets):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=compute == "bfloat16"):
            loss = F.cross_entropy(logits(model, tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        return loss.detach()

    return step


def main(size: str, mode: str, kind: str) -> None:
    """Serves training steps until the input ends."""
    from gpt_pytorch import adamw

    torch.manual_seed(0)
    if DEVICE == "cuda":
        torch.set_float32_matmul_precision("high")
    shape, every = SHAPES[size], LOG_EVERY[size]
    model = MODELS[kind](shape).to(DEVICE)
    model.train()
    count = sum(p.numel() for p in model.parameters())
    optimizer = adamw(model, LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    step = make_step(torch.compile(model) if mode == "compiled" else model, optimizer, shape.compute)
    windows = torch.randint(shape.vocabulary, (BATCHES, shape.rows, shape.length + 1), device=DEVICE)
    batches = [(w[:, :-1].contiguous(), w[:, 1:].contiguous()) for w in windows]
    for tokens, targets in batches[:3]:
        step(tokens, targets).item()
    done = 0
    for units in requests(unit=every * shape.rows * shape.length, parameters=count, threads=torch.get_num_threads()):
        for _ in range(units):
            for _ in range(every):
                loss = step(*batches[done % BATCHES])
                done += 1
            loss.item()


if __name__ == "__main__":
    main(*sys.argv[1:4])
