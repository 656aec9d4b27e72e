"""Statistics against scipy and textbook examples; the report against what was put in."""

import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from scipy import stats

from llm_jax.core.config import ConfigError
from llm_jax.lab import report, statistics, summary

RNG = np.random.default_rng(0)


def test_the_paired_test_is_scipys():
    a, b = RNG.normal(1, 1, 6), RNG.normal(0, 1, 6)
    got = statistics.paired_difference(dict(enumerate(a)), dict(enumerate(b)))
    expected = stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    np.testing.assert_allclose([got.mean, got.low, got.high, got.p], [(a - b).mean(), interval.low, interval.high, expected.pvalue])
    shifted = statistics.paired_difference(dict(enumerate(a)), dict(enumerate(b)), shift=0.3)
    np.testing.assert_allclose(shifted.p, stats.ttest_1samp(a - b, 0.3).pvalue)


def test_only_common_seeds_are_paired_and_one_is_not_tested():
    got = statistics.paired_difference({0: 1.0, 1: 2.0}, {1: 1.5, 2: 9.0})
    assert got == statistics.Difference(0.5, None, None, None, 1)
    assert statistics.verdict(got, None, sign=1) == "not tested"
    assert statistics.paired_difference({0: 1.0}, {1: 1.0}) is None


def test_holm_is_the_textbooks():
    assert statistics.holm([0.01, 0.04, 0.03, None]) == [0.03, 0.06, 0.06, None]
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]


@pytest.mark.parametrize("seeds", [2, 4, 25])
def test_an_arms_interval_covers_its_mean_at_any_number_of_seeds(seeds):
    found = np.array([statistics.mean_interval(x) for x in RNG.normal(0, 1, (2000, seeds))])
    assert abs(((found[:, 0] <= 0) & (found[:, 1] >= 0)).mean() - 0.95) < 0.015
    x = RNG.normal(size=seeds)
    expected = stats.t.interval(0.95, seeds - 1, x.mean(), stats.sem(x))
    np.testing.assert_allclose(statistics.mean_interval(x), expected, rtol=1e-12)
    assert statistics.mean_interval([1.0]) is None
    assert statistics.mean_interval([1.0, 1.0]) == (1.0, 1.0)


def test_the_noise_floor_detects_four_in_five():
    floor = statistics.noise_floor([RNG.normal(0, 1, 5) for _ in range(400)])
    assert abs(floor.deviation - 1) < 0.1
    a, b = RNG.normal(floor.detectable, 1, (4000, 5)), RNG.normal(0, 1, (4000, 5))
    assert abs((stats.ttest_rel(a, b, axis=1).pvalue < 0.05).mean() - 0.8) < 0.06


def trial(arm, phase, seed, value, rate, status="done"):
    metrics = (
        {}
        if status == "failed"
        else {"valid/bpb": value, "valid/bpb@1x": value, "valid/bpb@4x": None if value is None else value + 0.1}
    )
    return {
        "status": status, "error": "MemoryError: full" if status == "failed" else None, "phase": phase, "arm": arm,
        "nuisance": {"optimizer.learning_rate": rate}, "seed": seed, "fingerprint": "f", "trial": f"{arm}-{phase}-{seed}-{rate}", "config": {"class": "Experiment"},
        "metrics": metrics,
        "curve": {"step": [1, 2], "tokens": [8, 16], "flops": [1.0, 2.0], "seconds": [0.1, 0.2], "train/loss": [3.0, 2.0], "valid/bpb": [None, value]},
        "parameters": 10, "tokens": 16, "flops": 2.0, "seconds": 0.2,
        "ablation": {"name": "toy", "question": "Which <arm> & why?", "metric": "valid/bpb", "mode": "min", "tuning_metric": "valid/bpb", "baseline": "a",
                     "arms": ["a", "b", "c"], "scientific": {"a": {}, "b": {"model.depth": "2"}, "c": {"model.depth": "3"}},
                     "nuisance": {"optimizer.learning_rate": [0.1, 0.2, 0.4]}, "seeds": 4, "tuning_seeds": 1, "scale": "small",
                     "claims": [{"text": "b beats a", "better": "b", "than": "a", "metric": None, "by": 0.0},
                                {"text": "c beats a", "better": "c", "than": "a", "metric": None, "by": 0.0},
                                {"text": "a beats b", "better": "a", "than": "b", "metric": None, "by": 0.0}]},
        "provenance": {"command": "python -m llm_jax run", "date": "2026-01-01", "versions": {"jax": "0"}, "platform": "cpu", "device": "cpu", "devices": 2,
                       "population": 4, "group": "g", "corpus": "c", "tokenizer": "t"},
    }  # fmt: skip


def folder(path: pathlib.Path) -> pathlib.Path:
    noise = [0.01, -0.01, 0.02, 0.0]
    trials = [trial(arm, "final", s, base + noise[s] + wobble * noise[3 - s], rate)
              for arm, base, wobble, rate in (("a", 2.0, 0, 0.2), ("b", 1.5, 0.5, 0.4), ("c", 2.0, 1.0, 0.2)) for s in range(4)]  # fmt: skip
    trials += [trial(arm, "tune", 9, 2.0 + r, r) for arm in "abc" for r in (0.1, 0.2)] + [
        trial("a", "tune", 9, None, 0.4, "diverged")
    ]
    for t in trials:
        (path / "trials" / t["trial"]).mkdir(parents=True)
        (path / "trials" / t["trial"] / "results.json").write_text(json.dumps(t))
    return path


def test_the_report_says_what_the_trials_show(tmp_path):
    made = report.write([folder(tmp_path / "w")], tmp_path / "w")
    rows = {row["arm"]: row for row in made.data["arms"]}
    assert [rows[a]["verdict"] for a in "abc"] == ["baseline", "better", "no detectable difference"]
    assert rows["b"]["edges"] == ["optimizer.learning_rate"] and not rows["a"]["edges"]
    assert [c["verdict"] for c in made.data["claims"]] == ["supported", "inconclusive", "refuted"]
    assert any("diverged" in p for p in made.data["problems"])
    html, text = (tmp_path / "w" / "report.html").read_text(), (tmp_path / "w" / "report.md").read_text()
    for content in (html, text):
        assert all(
            word in content for word in ("supported", "refuted", "inconclusive", "no detectable difference", "edge of the grid")
        )
    assert "Which &lt;arm&gt; &amp; why?" in html and not re.search(r"""(src|href)=["']?https?:""", html)
    assert {f.stem for f in (tmp_path / "w" / "plots").glob("*.png")} >= {
        "arms",
        "length",
        "learning_curves_seconds",
        "sensitivity_optimizer_learning_rate",
    }
    json.loads((tmp_path / "w" / "results.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} in JSON"))


def test_a_rebuilt_report_is_the_same_to_the_byte(tmp_path):
    report.write([folder(tmp_path / "w")], tmp_path / "one")
    report.write([tmp_path / "w"], tmp_path / "two")
    for name in ("report.html", "report.md", "results.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_an_arm_whose_final_runs_diverge_is_not_better(tmp_path):
    work = folder(tmp_path / "w")
    for seed in (0, 1):
        lost = trial("b", "final", seed, None, 0.4, "diverged")
        (work / "trials" / lost["trial"] / "results.json").write_text(json.dumps(lost))
    made = report.write([work], work).data
    assert {row["arm"]: row["verdict"] for row in made["arms"]}["b"] == "diverges" and "better than" not in made["answer"]
    assert {c["text"]: c["verdict"] for c in made["claims"]}["b beats a"] == "inconclusive"


def test_settings_that_differ_between_folders_are_told(tmp_path):
    one, two = folder(tmp_path / "one"), folder(tmp_path / "two")
    for file in (two / "trials").glob("*/results.json"):
        changed = json.loads(file.read_text()) | {"config": {"class": "Experiment", "train": {"steps": 500}}}
        file.write_text(json.dumps(changed))
    made = summary.summarize([one, two]).data
    assert "train.steps is null in one, 500 in two" in made["problems"]
    rows = {row["arm"]: (row["verdict"], row["p"]) for row in made["arms"]}
    assert rows["two/b"] == ("other settings", None) and rows["one/b"][0] == "better", "unlike runs are not tested"
    assert "two/" not in made["answer"] and "Not compared, since their settings differ" in made["answer"]


def test_a_claim_is_tested_between_arms_of_two_folders(tmp_path):
    one, two = folder(tmp_path / "one"), folder(tmp_path / "two")
    for where, arms in ((one, "a"), (two, "bc")):
        for trial in [t for t in (where / "trials").iterdir() if t.name[0] not in arms]:
            shutil.rmtree(trial)
    claims = {c["text"]: c["verdict"] for c in summary.summarize([one, two]).data["claims"]}
    assert claims == {"b beats a": "supported", "c beats a": "inconclusive", "a beats b": "refuted"}


def test_folders_are_compared_under_their_names(tmp_path):
    made = summary.summarize([folder(tmp_path / "one"), folder(tmp_path / "two")])
    assert [row["arm"] for row in made.data["arms"]] == ["one/a", "two/a", "one/b", "two/b", "one/c", "two/c"]
    claims = {c["text"]: (c["better"], c["than"], c["verdict"]) for c in made.data["claims"]}
    assert (
        claims["b beats a (one)"]
        == ("one/b", "one/a", "supported")
        == tuple(x.replace("two", "one") for x in claims["b beats a (two)"])
    )
    with pytest.raises(ConfigError, match="holds no results"):
        summary.summarize([tmp_path])
