"""Trains trials in PyTorch: `python trials_pytorch.py SIZE TEXT STEPS RATESxSEEDS huggingface|gpt PROCESSES`.

One after another with all cores, or in several processes that share the trials and the cores. Every trial is evaluated at its
end on as many tokens as the other side. Prints the mean of the final validation losses.
"""

import pathlib
import sys
from multiprocessing import get_context

import numpy as np
import torch
from gpt_pytorch import adamw
from shapes import BETAS, EVALUATED, SHAPES, WEIGHT_DECAY, rates_and_seeds
from worker_pytorch import MODELS, logits, make_step


def windows(ids: np.ndarray, length: int) -> torch.Tensor:
    """`[n, length + 1]`: the text cut into windows, with each one's last target."""
    count = (len(ids) - 1) // length
    return torch.from_numpy(ids[np.arange(count)[:, None] * length + np.arange(length + 1)])


def train(size: str, text: str, steps: int, kind: str, rate: float, seed: int) -> float:
    """One trial; its final validation loss."""
    shape = SHAPES[size]
    characters = pathlib.Path(text).read_text()
    known = {c: i for i, c in enumerate(sorted(set(characters)))}
    ids = np.array([known[c] for c in characters], np.int64)
    cut = int(len(ids) * 0.9)
    training, validation = windows(ids[:cut], shape.length), windows(ids[cut:], shape.length)[: EVALUATED // shape.length]
    torch.manual_seed(seed)
    model = MODELS[kind](shape)
    step = make_step(model, adamw(model, rate, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True))
    order = torch.cat([torch.randperm(len(training)) for _ in range(-(-steps * shape.rows // len(training)))])
    for index in range(steps):
        rows = training[order[index * shape.rows : (index + 1) * shape.rows]]
        step(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                logits(model, rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
            ).item()
            for rows in validation.split(shape.rows)
        ]
    return sum(losses) / validation[:, 1:].numel()


def main(size: str, text: str, steps: int, trials: str, kind: str, processes: int) -> None:
    """Runs all trials."""
    rates, seeds = rates_and_seeds(trials)
    jobs = [(size, text, steps, kind, rate, seed) for rate in rates for seed in seeds]
    if processes == 1:
        losses = [train(*job) for job in jobs]
    else:
        with get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
            losses = pool.starmap(train, jobs, chunksize=1)
    print(sum(losses) / len(losses))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5], int(sys.argv[6]))
