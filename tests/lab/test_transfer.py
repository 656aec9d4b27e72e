"""How far a best learning rate moves, against parabolas whose lowest points are known; claims about it in a report."""

import json
import math

import numpy as np
import pytest

from llm_jax.core.config import ConfigError
from llm_jax.lab import Ablation, Arms, Experiment, Steadier, summary, transfer

RATE = "optimizer.learning_rate"
GRID = tuple(2.0**-k for k in range(10, 3, -1))
ARMS = ("mup-1x", "mup-8x", "standard-1x", "standard-8x")
CLAIM = Steadier(
    "stays", better="mup-8x", since="mup-1x", than="standard-8x", than_since="standard-1x", nuisance=RATE, by=1.0
)  # fmt: skip


def trials(best, *, seeds=3, wobble=0.1):
    """Of every arm a loss that is a parabola in log2 of the rate, lowest near `best`, a little elsewhere for each seed."""
    rng = np.random.default_rng(0)
    found = []
    for arm, lowest in best.items():
        for seed in range(seeds):
            own = lowest + wobble * rng.normal()
            for rate in GRID:
                loss = 2 + 0.05 * (math.log2(rate) - own) ** 2
                found.append(trial(arm, "tune", seed, rate, loss))
        found.append(trial(arm, "final", 0, 2.0**-7, 2.0))
    return found


def trial(arm, phase, seed, rate, loss):
    return {
        "arm": arm, "phase": phase, "status": "done" if loss else "diverged", "seed": seed, "nuisance": {RATE: rate}, "error": None,
        "metrics": {"valid/loss": loss}, "parameters": 1, "tokens": 1, "flops": 1.0, "seconds": 1.0,
        "config": {"class": "Experiment"},
        "curve": {"step": [1], "tokens": [1], "flops": [1.0], "seconds": [1.0], "valid/loss": [loss]},
        "provenance": {"date": "2026", "corpus": "c", "tokenizer": "t"},
    }  # fmt: skip


def test_the_lowest_point_of_a_parabola_is_found_between_the_grids():
    points = {x: 3 + 0.2 * (x + 6.3) ** 2 for x in np.log2(GRID)}
    assert transfer.lowest(points) == pytest.approx(-6.3)
    assert transfer.lowest({x: x for x in (1.0, 2.0, 3.0)}) is None, "at an edge nobody knows how far beyond"
    assert transfer.lowest({1.0: 3.0, 2.0: 2.0, 3.0: math.inf}) == 2.0


def test_moves_are_those_of_each_seed():
    found = trials({"mup-1x": -6.0, "mup-8x": -6.5}, wobble=0)
    assert transfer.moves(found, ("mup-1x", "mup-8x"), RATE, "valid/loss", sign=1) == pytest.approx({0: 0.5, 1: 0.5, 2: 0.5})


def test_a_rate_that_diverges_is_not_the_best():
    found = trials({"mup-1x": -6.0}, wobble=0) + trials({"mup-8x": -6.0}, wobble=0)
    lost = [one | {"metrics": {"valid/loss": None}} if one["nuisance"][RATE] > 2.0**-6.5 else one for one in found]
    assert transfer.moves(lost, ("mup-1x", "mup-8x"), RATE, "valid/loss", sign=1)[0] == 0
    assert transfer._best(lost, "mup-1x", RATE, "valid/loss", 1)[0] == -7.0


def test_seeds_whose_best_is_the_grids_last_say_nothing():
    found = trials({"standard-1x": -6.0, "standard-8x": -12.0}, wobble=0)
    assert transfer.moves(found, ("standard-1x", "standard-8x"), RATE, "valid/loss", sign=1) == {}


def ablation(claims=(CLAIM,), arms=ARMS, **changes):
    scientific = Arms({arm: {"model.width": 32 + 32 * i} for i, arm in enumerate(arms)})
    return Ablation("stay?", Experiment(), scientific, {RATE: GRID}, metric="valid/loss", claims=claims, **changes)


@pytest.mark.parametrize(
    "best, verdict",
    [
        ({"mup-1x": -6.0, "mup-8x": -6.2, "standard-1x": -6.0, "standard-8x": -9.0}, "supported"),
        ({"mup-1x": -6.0, "mup-8x": -8.8, "standard-1x": -6.0, "standard-8x": -6.1}, "refuted"),
        ({"mup-1x": -6.0, "mup-8x": -6.9, "standard-1x": -6.0, "standard-8x": -7.95}, "inconclusive"),
    ],
)
def test_a_claim_about_the_best_rate_gets_its_verdict(tmp_path, best, verdict):
    described = ablation().described("small")
    for i, one in enumerate(trials(best)):
        (tmp_path / "trials" / str(i)).mkdir(parents=True)
        (tmp_path / "trials" / str(i) / "results.json").write_text(json.dumps(one | {"ablation": described}))
    (claim,) = summary.summarize([tmp_path]).data["claims"]
    moved = [abs(best[arms[1]] - best[arms[0]]) for arms in (ARMS[:2], ARMS[2:])]
    assert claim["verdict"] == verdict and claim["metric"] == f"moves of {RATE}, log2"
    assert claim["difference"]["mean"] == pytest.approx(moved[0] - moved[1], abs=0.3) and claim["difference"]["pairs"] == 3


def test_a_claim_needs_its_four_arms_and_what_is_tuned():
    assert ablation().only(ARMS[:3]).claims == () and ablation().only(ARMS).claims == (CLAIM,)
    with pytest.raises(ConfigError, match="names the arm 'standard-1x', but the arms are"):
        ablation(arms=ARMS[:2] + ARMS[3:])
    other = Steadier("so", *ARMS[:2], since=ARMS[2], than_since=ARMS[3], nuisance="train.steps")
    with pytest.raises(ConfigError, match=r"claim 'so' is about 'train\.steps', but what is tuned is: optimizer\.learning_rate"):
        ablation(claims=[other])
