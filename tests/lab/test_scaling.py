"""Scaling laws against what made the data, another optimizer and closed forms; what is said where the runs do not suffice."""

import itertools
import json
import re

import jax
import numpy as np
import pytest
from scipy import optimize

from llm_jax.cli import fit as command
from llm_jax.core.config import ConfigError, override, to_json
from llm_jax.core.sharding import unbox
from llm_jax.lab import presets, scaling
from llm_jax.lab.components import MoE
from llm_jax.lab.scaling import law as laws
from llm_jax.lab.scaling.law import DELTA, Law, bootstrap, fit, interval
from llm_jax.lab.scaling.optimum import Compute, optimum, power, profiles
from llm_jax.lab.scaling.runs import COUNTS, Runs
from llm_jax.models.model import abstract_parameters

# Besiroglu et al. 2024, "Chinchilla scaling: a replication attempt"
CHINCHILLA = Law(("N", "D"), 1.8172, (482.01, 2085.43), (0.3478, 0.3658))
GRID = np.array(list(itertools.product(np.geomspace(5e7, 1e10, 4), np.geomspace(1e9, 1e11, 4))))


def noisy(law, x, deviation, seed=0):
    return law(x) * np.exp(np.random.default_rng(seed).normal(0, deviation, len(x)))


def close(found, law, rtol):
    for name, value in law.parameters.items():
        np.testing.assert_allclose(found.parameters[name], value, rtol=rtol, err_msg=name)


# ── the fit ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "law", [CHINCHILLA, Law(("N",), 2.0, (300.0,), (0.3,)), Law(("C",), 0.5, (40.0,), (0.05,))], ids=lambda law: str(law.variables)
)
def test_what_made_the_losses_is_found_again(law):
    x = GRID if len(law.variables) == 2 else np.geomspace(1e6, 1e11, 8)[:, None]
    close(fit(law.variables, x, law(x)), law, 1e-3)


def test_a_power_law_without_a_floor_has_none():
    law, x = Law(("N",), 1e-9, (100.0,), (0.2,)), np.geomspace(1e6, 1e10, 8)[:, None]
    found = fit(("N",), x, law(x))
    assert found.floor < 1e-3 * law(x).min() and found.exponents[0] == pytest.approx(0.2, rel=1e-2)


def test_the_gradient_is_that_of_finite_differences():
    z, log_loss = np.log(GRID) - np.log(GRID).mean(axis=0), np.log(noisy(CHINCHILLA, GRID, 0.01))
    theta = np.array([0.5, -1.0, -0.7, 0.3, 0.4])
    numeric = optimize.approx_fprime(theta, lambda at: laws.objective(at, z, log_loss)[0], 1e-7)
    np.testing.assert_allclose(laws.objective(theta, z, log_loss)[1], numeric, rtol=1e-4)


def test_another_optimizer_finds_the_same_minimum():
    """Levenberg's kind on Huber's loss as scipy defines it, in A, B, E themselves, from the truth."""
    loss = noisy(CHINCHILLA, GRID, 0.01)

    def residuals(theta):
        scale = np.array([1.0, 100.0, 1000.0, 1.0, 1.0])
        floor, a, b, alpha, beta = theta * scale
        return np.log(floor + a / GRID[:, 0] ** alpha + b / GRID[:, 1] ** beta) - np.log(loss)

    start = np.array([1.8172, 4.8201, 2.08543, 0.3478, 0.3658])
    other = optimize.least_squares(
        residuals, start, loss="huber", f_scale=DELTA, x_scale="jac", ftol=1e-15, xtol=1e-15, gtol=1e-15, max_nfev=5000
    )
    found = fit(("N", "D"), GRID, loss)
    assert found.objective <= other.cost / DELTA**2 * (1 + 1e-6)
    assert found.objective == pytest.approx(other.cost / DELTA**2, rel=1e-3)
    np.testing.assert_allclose(found(GRID), np.exp(residuals(other.x)) * loss, rtol=1e-3)


def test_a_run_that_went_wrong_moves_little():
    loss = noisy(CHINCHILLA, GRID, 0.001)
    loss[5] *= 1.5
    close(fit(("N", "D"), GRID, loss), CHINCHILLA, 0.25)


@pytest.mark.slow
@pytest.mark.parametrize(
    "law, points", [(CHINCHILLA, GRID), (Law(("N",), 2.0, (300.0,), (0.3,)), np.geomspace(1e6, 1e10, 8)[:, None])]
)
def test_intervals_cover_what_is_true(law, points):
    """Two seeds a point and 100 draws, where 95% are meant: such few points give somewhat less."""
    x, hits, trials = np.repeat(points, 2, axis=0), [], 30
    beyond = 30 * points.max(axis=0)
    for seed in range(trials):
        loss = noisy(law, x, 0.005, seed)
        drawn = bootstrap(fit(law.variables, x, loss), x, loss, draws=100, seed=seed)
        spans = [interval([one.parameters[name] for one in drawn]) for name in law.parameters]
        spans.append(interval([one(beyond) for one in drawn]))
        hits.append(
            [low <= value <= high for value, (low, high) in zip([*law.parameters.values(), law(beyond)], spans, strict=True)]
        )
    assert np.mean(hits, axis=0).min() >= 0.7 and np.mean(hits) >= 0.85, np.mean(hits, axis=0)


def test_draws_never_lack_what_tells_the_parameters_apart():
    x = np.repeat(np.geomspace(1e6, 1e9, 4)[:, None], 2, axis=0)
    law = Law(("N",), 2.0, (300.0,), (0.3,))
    drawn = bootstrap(law, x, noisy(law, x, 0.002), draws=20)
    assert all(abs(one.exponents[0] - 0.3) < 0.1 for one in drawn)


# ── budgets ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("ratio", [1.0, 1.3])
def test_the_best_size_is_the_closed_forms(ratio):
    """Hoffmann et al. 2022, equation 4, for C = 6 · ratio · N · D."""
    (alpha, beta), (A, B) = CHINCHILLA.exponents, CHINCHILLA.factors
    N, D, loss = optimum(CHINCHILLA, Compute(np.log([1e9]), np.array([ratio])), 5.76e23)
    spent = 5.76e23 / 6 / ratio
    G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    np.testing.assert_allclose([N, D], [G * spent ** (beta / (alpha + beta)), spent ** (alpha / (alpha + beta)) / G], rtol=1e-4)
    assert loss == pytest.approx(CHINCHILLA(np.array([N, D])))


def test_flops_a_token_are_those_of_the_runs():
    runs = Runs(("a", "b"), (0, 0), np.array([1e6, 1e8]), np.array([1e7, 1e9]), np.array([1.5 * 6e13, 1.1 * 6e17]), np.ones(2))
    compute = Compute.of(runs)
    np.testing.assert_allclose(compute.per_token(np.array([1e6, 1e7, 1e8, 1e10])), 6 * np.array([1.5e6, 1.3e7, 1.1e8, 1.1e10]))


def isoflop(minima, seeds=1):
    """Runs whose loss is a parabola in log N with its lowest point where it is told, for each C."""
    rows = [(C, N, 2 + 0.1 * np.log(N / best) ** 2) for C, best in minima for N in best * np.geomspace(0.3, 4, 5)]
    C, N, loss = np.repeat(np.array(rows), seeds, axis=0).T
    return Runs(tuple(f"{c:g}-{n:g}" for c, n in zip(C, N, strict=True)), (0,) * len(C), N, C / (6 * N), C, loss)


def test_parabolas_are_lowest_where_they_are():
    runs = isoflop([(1e18, 1e8), (1e19, 10**8.5), (1e20, 1e9)])
    found = profiles(runs, Compute.of(runs))
    np.testing.assert_allclose([one.N for one in found], [1e8, 10**8.5, 1e9], rtol=1e-6)
    np.testing.assert_allclose([one.D for one in found], [one.C / 6 / one.N for one in found], rtol=1e-6)
    np.testing.assert_allclose(power(found), (0.1, 0.5), rtol=1e-6)
    assert profiles(isoflop([(1e18, 1e8)]), Compute.of(runs)) == [], "one profile says nothing of growth"


def test_a_profile_whose_lowest_point_was_not_trained_has_none():
    runs = isoflop([(1e18, 1e8), (1e19, 3e8)])
    cut = runs.where((runs.C < 5e18) | (runs.N > 3.2e8))
    found = profiles(cut, Compute.of(cut))
    np.testing.assert_allclose(found[0].N, 1e8, rtol=1e-6)
    assert found[1].N is None and power(found) is None


# ── from folders to a page ───────────────────────────────────────────────────────────────────────────────────────────
def trial(arm, seed, N, D, loss, **changes):
    return {
        "arm": arm, "phase": "final", "status": "done", "seed": seed, "nuisance": {},
        "metrics": {"valid/loss": loss, "valid/accuracy": 0.5},
        "parameters": N, "tokens": D, "flops": 6.6 * N * D, "config": {}, "error": None,
        "ablation": {"metric": "valid/loss", "mode": "min", "arms": [], "scientific": {}, "nuisance": {}, "seeds": 2},
        "provenance": {"date": "2026", "corpus": "c", "tokenizer": "t"},
    } | changes  # fmt: skip


def folder(path, points, *, seeds=2, law=CHINCHILLA, **changes):
    rng = np.random.default_rng(0)
    for (i, (N, D)), seed in itertools.product(enumerate(points), range(seeds)):
        at = np.array([{"N": N, "D": D}[name] for name in law.variables])
        one = trial(f"arm{i}", seed, float(N), float(D), float(law(at) * np.exp(rng.normal(0, 0.003))), **changes)
        (path / "trials" / f"{i}-{seed}").mkdir(parents=True)
        (path / "trials" / f"{i}-{seed}" / "results.json").write_text(json.dumps(one))
    return path


def test_a_study_predicts_what_it_has_not_seen_and_writes_a_page(tmp_path):
    work = folder(tmp_path / "w", GRID)
    found = scaling.study([work], budgets=[1e22], draws=30)
    assert [one.arm for one in found.held] == ["arm15"] and abs(found.held[0].error) < 0.01
    for name, value in CHINCHILLA.parameters.items():
        assert found.parameters[name][1] * 0.9 < value < found.parameters[name][2] * 1.1, name
    (budget,) = found.budgets
    np.testing.assert_allclose(6.6 * budget.N * budget.D, 1e22)
    assert budget.intervals["N"][0] <= budget.N <= budget.intervals["N"][1]
    page = scaling.write(found, tmp_path / "out").read_text()
    assert not re.search(r"""(src|href)=["']?https?:""", page) and "arm15" in page and page.count("<svg") == 3
    assert {file.name for file in (tmp_path / "out").glob("*.png")} == {"law.png", "optimum.png", "residuals.png"}
    told = json.loads((tmp_path / "out" / "fit.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} in JSON"))
    assert told["law"]["α"]["value"] == found.parameters["α"][0] and len(told["runs"]) == 32


@pytest.mark.parametrize(
    "points, law, said",
    [
        (
            [(N, 20 * N) for N in np.geomspace(1e7, 1e9, 6)],
            ("N",),
            "D / N is 20 in all runs, so the law is of N alone, with D = 20 N",
        ),
        ([(N, 1e10) for N in np.geomspace(1e7, 1e9, 6)], ("N",), "all runs read as many tokens"),
        ([(1e8, D) for D in np.geomspace(1e9, 1e11, 6)], ("D",), "all models are of one size"),
    ],
)
def test_runs_that_tell_one_variable_apart_give_a_law_of_it(tmp_path, points, law, said):
    truth = Law(law, 2.0, (300.0,), (0.3,))
    found = scaling.study([folder(tmp_path / "w", points, law=truth)], draws=20)
    assert found.law.variables == law and any(said in note for note in found.notes) and not found.budgets
    assert found.law.exponents[0] == pytest.approx(0.3, abs=0.06)
    scaling.write(found, tmp_path / "out")


def test_profiles_are_seen_among_the_runs(tmp_path):
    points = [(N, C / 6.6 / N) for C in (1e19, 1e20) for N in np.geomspace(5e7, 2e9, 6) * (C / 1e19) ** 0.5]
    found = scaling.study([folder(tmp_path / "w", points)], draws=20)
    assert len(found.profiles) == 2 and len(found.held) == 6, "the whole profile of the most compute is held out"
    for one in found.profiles:
        np.testing.assert_allclose(one.N, optimum(CHINCHILLA, found.compute, one.C)[0], rtol=0.2)
    assert "isoflop" in {file.stem for file in scaling.write(found, tmp_path / "out").parent.glob("*.png")}


RATIO = [(N, 20 * N) for N in np.geomspace(1e7, 1e9, 6)]


@pytest.mark.parametrize(
    "points, given, said",
    [
        (
            RATIO,
            {"law": "N,D"},
            "a law of N and D cannot be told apart where D / N is the same in all runs: --law=N fits sizes alone",
        ),
        (RATIO[:3], {}, "a law of N needs at least 4 different sizes, got 3: add some"),
        (GRID[:2], {}, "a law of D needs at least 4 different token budgets, got 2"),
        (GRID[:8], {}, "a law of N and D needs at least 3 different sizes, got 2"),
        (RATIO, {"metric": "valid/los"}, "--metric=valid/los is no metric that all runs have: did you mean valid/loss"),
        (RATIO, {"metric": "valid/accuracy"}, "is no loss, which falls to a floor"),
        (RATIO, {"holdout": ["arm9"]}, "--holdout=arm9 is no arm of these runs: did you mean arm5"),
    ],
)
def test_what_does_not_suffice_is_a_sentence(tmp_path, points, given, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        scaling.study([folder(tmp_path / "w", points)], draws=20, **given)


def test_runs_that_diverged_are_left_out_and_told(tmp_path):
    work = folder(tmp_path / "w", GRID, seeds=1)
    file = work / "trials" / "3-0" / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "diverged", "metrics": {"valid/loss": None}}))
    found = scaling.study([work], draws=20)
    assert len(found.runs) == 15 and any("arm3: 1 run diverged" in note for note in found.notes)
    with pytest.raises(ConfigError, match="holds no final run that ended well"):
        scaling.study([folder(tmp_path / "none", GRID[:2], status="diverged")])


def test_what_stays_unknown_is_said(tmp_path):
    flat = Law(("N",), 2.0, (1e-9,), (0.3,))
    found = scaling.study([folder(tmp_path / "w", RATIO, law=flat, seeds=1)], holdout=["NONE"], draws=20)
    assert any("may be 0" in note or "E is not known" in note for note in found.notes), found.notes


@pytest.mark.parametrize("changes", [{}, {"model.ffn": MoE(experts=4)}])
def test_what_n_counts(changes):
    given = override(presets.nano(), changes)
    params = unbox(abstract_parameters(given.model, 256))
    total, table = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, params["embedding"]))
    one = {"parameters": total, "config": to_json(given)}
    assert COUNTS["all"](one) == total and COUNTS["body"](one) == total - table
    assert (COUNTS["active"](one) < COUNTS["all"](one)) == bool(changes)


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def fresh():
    command.FLAGS.unparse_flags()


def test_the_command_prints_and_writes(tmp_path, capsys, fresh):
    work = folder(tmp_path / "w", GRID)
    assert command.main(["fit", f"--workdir={work}", "--compute=1e21,1e22", "--draws=20", "--holdout=NONE"]) == 0
    shown = capsys.readouterr().out
    assert "L = " in shown and "1e+22" in shown and "Held out" not in shown and (work / "fit" / "fit.html").is_file()


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "--workdir is missing"),
        (["--workdir=a", "--workdir=b"], "--out is missing"),
        (["--workdir=a", "--compute=lots"], "--compute=lots must be FLOPs"),
        (["--workdir=a", "--law=M"], "should be one of"),
        (["--workdir=nowhere"], "nowhere holds no results"),
    ],
)
def test_what_is_typed_wrong_is_a_sentence(flags, said, fresh):
    with pytest.raises(ConfigError, match=re.escape(said)):
        command.main(["fit", *flags])
