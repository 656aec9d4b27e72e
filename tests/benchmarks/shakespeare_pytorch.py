"""nanoGPT's published CPU run, written again in PyTorch: `python shakespeare_pytorch.py TEXT`; prints JSON lines.

Karpathy 2022, README, "I only have a macbook": 4 layers, 4 heads, 128 wide, block 64, batch 12, 2,000 steps, learning rate 1e-3
falling in a cosine to 1e-4 after 100 steps of warm-up, beta2 0.99, weight decay 0.1, no dropout, no biases, clipped at 1; every 250
steps the loss of 20 random batches of each split. Seconds count from the start of the process; the whole validation split is
scored after the clock has stopped.
"""

import json
import math
import os
import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F
from gpt_pytorch import GPT, adamw
from harness import age

STEPS, WARMUP, PEAK, LOWEST = 2000, 100, 1e-3, 1e-4
ROWS, LENGTH, EVERY, EVALUATED = 12, 64, 250, 20


def learning_rate(step: int) -> float:
    """Warm-up, then a cosine."""
    if step < WARMUP:
        return PEAK * (step + 1) / (WARMUP + 1)
    return LOWEST + 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) * (PEAK - LOWEST)


def draw(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of random windows and their targets."""
    starts = torch.randint(len(ids) - LENGTH, (ROWS,)).tolist()
    return torch.stack([ids[i : i + LENGTH] for i in starts]), torch.stack([ids[i + 1 : i + LENGTH + 1] for i in starts])


def loss_of(model: GPT, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy, nats a character."""
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


@torch.no_grad()
def sampled(model: GPT, ids: torch.Tensor) -> float:
    """nanoGPT's estimate: the mean over random batches."""
    return float(np.mean([loss_of(model, *draw(ids)).item() for _ in range(EVALUATED)]))


@torch.no_grad()
def whole(model: GPT, ids: torch.Tensor) -> float:
    """The mean over all windows of a split, cut one after another."""
    count = (len(ids) - 1) // LENGTH
    rows = ids[torch.arange(count)[:, None] * LENGTH + torch.arange(LENGTH + 1)]
    losses = [loss_of(model, part[:, :-1], part[:, 1:]).item() * len(part) for part in rows.split(64)]
    return sum(losses) / count


def main(text: str) -> None:
    """Trains, and prints the losses with the seconds since the start."""
    torch.manual_seed(int(os.environ.get("SEED", "1337")))
    characters = pathlib.Path(text).read_text()
    known = {c: i for i, c in enumerate(sorted(set(characters)))}
    ids = torch.tensor([known[c] for c in characters])
    cut = int(len(ids) * 0.9)
    training, validation = ids[:cut], ids[cut:]
    model = GPT(depth=4, width=128, heads=4, length=LENGTH, vocabulary=len(known), bias=False)
    optimizer = adamw(model, PEAK, betas=(0.9, 0.99), weight_decay=0.1, fused=False)
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            scored = {"step": step, "train": sampled(model, training), "valid_sampled": sampled(model, validation)}
            print(json.dumps(scored | {"seconds": age()}), flush=True)
        if step == STEPS:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        loss = loss_of(model, *draw(training))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()  # nanoGPT prints every step's loss
    print(json.dumps({"valid": whole(model, validation)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
