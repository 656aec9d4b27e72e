"""Declaring: how arms compose, what scales and selections change, and what is refused; a work folder knows whose it is."""

import json
import pathlib

import pytest

from llm_jax.core.config import ConfigError, fingerprint, from_json, to_json
from llm_jax.lab import Ablation, Arms, Claim, Experiment, chain, log_grid, product, zipped
from llm_jax.lab.experiment import load
from llm_jax.lab.population import check_mesh, layout
from llm_jax.lab.workfolder import WorkFolder
from llm_jax.nn.position import Alibi, NoPosition, Rope
from llm_jax.optim.optimizers import SGD, AdamW, Lion

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
POSITIONS = {"model.position": {"rope": Rope(), "alibi": Alibi()}}
RATES = {"optimizer.learning_rate": (1e-3, 1e-2)}
WIDTHS = {"model.width": {"narrow": 32, "wide": 64}}


def ablation(**changes) -> Ablation:
    given = {"question": "Which?", "base": Experiment(), "scientific": POSITIONS, "nuisance": RATES}
    return Ablation(**given | changes)


def test_a_product_is_every_combination():
    arms = product(POSITIONS, WIDTHS).changes
    assert list(arms) == ["rope+narrow", "rope+wide", "alibi+narrow", "alibi+wide"]
    assert arms["alibi+wide"] == {"model.position": Alibi(), "model.width": 64}
    assert ablation(scientific=POSITIONS | WIDTHS).arms == arms, "several paths in one declaration are crossed"


def test_zipped_goes_in_step_and_chain_one_after_another():
    assert zipped(POSITIONS, WIDTHS).changes == {
        "rope+narrow": {"model.position": Rope(), "model.width": 32},
        "alibi+wide": {"model.position": Alibi(), "model.width": 64},
    }
    both = Arms({"both": {"model.position": NoPosition(), "model.width": 32}})
    assert list(chain(POSITIONS, both).changes) == ["rope", "alibi", "both"]


@pytest.mark.parametrize(
    "build, sentence",
    [
        (lambda: zipped(POSITIONS, {"model.depth": {"one": 1}}), "zipped needs parts of one length, got 2, 1"),
        (lambda: chain(POSITIONS, POSITIONS), "chain has two arms called 'rope'"),
        (lambda: product(POSITIONS, {"model.position": {"none": NoPosition()}}), "two parts set model.position"),
        (lambda: log_grid(1e-2, 1e-3, 3), "log_grid needs 0 < low <= high"),
        (lambda: ablation(scientific={"model.positoin": {"a": Rope()}}), "did you mean position"),
        (lambda: ablation(scientific={"model.depth": {"deep": -1}}), "model.depth must be > 0, got -1 (in arm 'deep')"),
        (lambda: ablation(claims=[Claim("so", better="rope", than="t5")]), "names the arm 't5', but the arms are rope, alibi"),
        (lambda: ablation(baseline="none"), "baseline names the arm 'none'"),
        (lambda: ablation(seeds=0), "seeds must be >= 1, got 0"),
        (lambda: ablation(nuisance={"optimizer.learning_rate": ()}), "is an empty grid"),
        (lambda: ablation(scales={"small": {}}).at_scale("large"), "has no scale 'large': it declares small"),
        (lambda: ablation().only(["sinusoidal"]), "--arms names the arm 'sinusoidal'"),
    ],
)
def test_what_is_refused(build, sentence):
    with pytest.raises(ConfigError) as error:
        build()
    assert sentence in str(error.value)


def test_a_log_grid_is_even_in_the_logarithm():
    assert log_grid(1e-3, 1e-1, 3) == (0.001, 0.01, 0.1)
    assert log_grid(2e-3, 5e-1, 1) == (0.002,)


def test_a_scale_changes_the_base_the_arms_and_the_ablation():
    scale = {"train.steps": 7, "seeds": 5, "arms": {"rope": {"model.position": Rope(theta=500.0)}}}
    changed = ablation(scales={"tiny": scale}).at_scale("tiny")
    assert changed.seeds == 5 and changed.experiment("rope").model.position == Rope(theta=500.0)
    assert changed.experiment("alibi").train.steps == 7


def test_a_selection_drops_the_claims_that_need_the_others():
    claims = [Claim("a", better="rope", than="alibi"), Claim("b", better="none", than="rope")]
    positions = {"model.position": {"rope": Rope(), "alibi": Alibi(), "none": NoPosition()}}
    kept = ablation(scientific=positions, claims=claims, baseline="alibi").only(["rope", "none"])
    assert list(kept.arms) == ["rope", "none"] and [c.text for c in kept.claims] == ["b"] and kept.baseline is None


def test_an_arm_may_be_a_whole_component_that_the_grid_reaches_into():
    tuned = ablation(scientific={"optimizer": {"adamw": AdamW(), "lion": Lion()}})
    assert tuned.experiment("lion", {"optimizer.learning_rate": 1e-2}).optimizer == Lion(learning_rate=1e-2)


def test_an_experiment_survives_json_and_its_fingerprint_sees_every_change():
    experiment = ablation(scientific={"optimizer": {"sgd": SGD()}}).experiment("sgd", seed=3)
    again = from_json(json.loads(json.dumps(to_json(experiment))), Experiment)
    assert again == experiment and fingerprint(again) == fingerprint(experiment) != fingerprint(Experiment())


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("", "declares neither"),
        ("ablation = 3", "declares neither"),
        ("ablation = (", "cannot be run: SyntaxError"),
        ("from llm_jax.lab import Ablatoin", "did you mean Ablation"),
        ("from llm_jax.optim.optimizers import SGD\nSGD(0.0)", "must be > 0"),
    ],
)
def test_a_file_that_declares_nothing_is_named(tmp_path, content, sentence):
    (tmp_path / "e.py").write_text(content)
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "e.py")
    assert sentence in str(error.value) and "e.py" in str(error.value)


CORPORA = {"rope": "a1", "alibi": "a1"}
SWAPPED = {"model.position": {"rope": Alibi(), "alibi": Alibi()}}


def test_a_work_folder_takes_its_own_ablation_again(tmp_path):
    folder = WorkFolder(tmp_path / "w")
    folder.claim(ablation(), corpora=CORPORA)
    folder.claim(ablation(seeds=9), corpora=CORPORA)
    folder.claim(ablation().only(["rope"]), corpora={"rope": "a1"})
    folder.claim(ablation(), corpora=CORPORA)


@pytest.mark.parametrize(
    "other, corpora, sentence",
    [
        (lambda: ablation(base=Experiment(seed=4)), CORPORA, "seed is 0 there and 4 here"),
        (
            lambda: ablation(nuisance={"optimizer.learning_rate": (1e-3,)}),
            CORPORA,
            "optimizer.learning_rate is [0.001, 0.01] there",
        ),
        (lambda: ablation(scientific=SWAPPED), CORPORA, "is Rope there and Alibi here"),
        (ablation, CORPORA | {"rope": "b2"}, 'corpora.rope is "a1" there and "b2" here'),
    ],
)
def test_a_work_folder_refuses_another_ablation_and_says_what_differs(tmp_path, other, corpora, sentence):
    folder = WorkFolder(tmp_path / "w")
    folder.claim(ablation(), corpora=CORPORA)
    before = (tmp_path / "w" / "ablation.json").read_bytes()
    with pytest.raises(ConfigError) as error:
        folder.claim(other(), corpora=corpora)
    assert "belongs to another experiment" in str(error.value) and sentence in str(error.value), str(error.value)
    assert (tmp_path / "w" / "ablation.json").read_bytes() == before


def test_a_run_of_some_arms_leaves_what_the_others_declared(tmp_path):
    folder, claims = WorkFolder(tmp_path / "w"), [Claim("r", better="rope", than="alibi")]
    folder.claim(ablation(claims=claims), corpora=CORPORA)
    folder.claim(ablation(claims=claims, seeds=9).only(["alibi"]), corpora={"alibi": "a1"})
    kept = folder.declared()
    assert (kept["arms"], kept["baseline"], kept["seeds"]) == (["rope", "alibi"], "rope", 9)
    assert [c["text"] for c in kept["claims"]] == ["r"] and set(kept["scientific"]) == {"rope", "alibi"}
    folder.claim(ablation(claims=[Claim("new", better="alibi", than="rope")], baseline="alibi"), corpora=CORPORA)
    assert [c["text"] for c in folder.declared()["claims"]] == ["new"] and folder.declared()["baseline"] == "alibi"


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.glob("c*.py")), ids=lambda f: f.stem)
def test_every_scale_of_every_experiment_fits_any_machine(file):
    declared = load(file)
    for scale in declared.scales:
        at = declared.at_scale(scale)
        for arm in at.arms:
            experiment = at.experiment(arm)
            for devices in (1, 2, 6, 8, 24, 64, 96, 256):
                for members in (1, at.seeds, len(at.grid), 5):
                    check_mesh(experiment, layout(experiment, members, devices)[0])


@pytest.mark.parametrize(
    "text, sentence",
    [
        (
            "Rope(thta=5)",
            "line 4 cannot be run: TypeError: Rope.__init__() got an unexpected keyword",
        ),
        ("Ablation(question='q', base=Experiment(), nuissance={})", "'nuissance': did you mean nuisance?"),
        ("Ablation(question='q', base=Experiment(), claims=['rope wins'])", "line 4: claims must be Claim(…)s, got 'rope wins'"),
        ("1 / 0", "line 4 cannot be run: ZeroDivisionError"),
        ("Rope(theta=-1.0)", "line 4: theta must be > 0"),
        ("Ablation(question='q', base=Experiment(), nuisance={'optimizer.learning_rate': 1e-3})", "must be a tuple of values"),
        ("Ablation(question='q', base=Experiment(), scientific={'model.depth': [1, 2]})", "must be {name: value}, got [1, 2]"),
        (
            "Ablation(question='q', base=Experiment(), scales={'full': {'train.stpes': 5}})",
            "scale 'full': train.stpes is",
        ),
        ("Ablation(question='q', base=Experiment(), scientific={'model.dpeth': {'a': 1}})", "did you mean depth"),
    ],
)
def test_a_mistake_in_the_file_is_a_sentence_with_its_line(text, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.py").write_text(
        f"from llm_jax.lab import Ablation, Experiment\nfrom llm_jax.nn.position import Rope\n\nablation = {text}\n"
    )
    with pytest.raises(ConfigError) as error:
        load("wrong.py")
    assert sentence in str(error.value) and "\n" not in str(error.value), str(error.value)
    assert "thta" not in text or str(error.value).endswith("'thta': did you mean theta?")


def test_a_metric_has_one_direction():
    sign = ablation(metric="valid/accuracy", mode="max", tuning_metric="valid/bits_per_byte").sign
    assert [sign(m) for m in ("valid/accuracy", "valid/accuracy@4x", "valid/bits_per_byte", "test/accuracy")] == [-1, -1, 1, -1]


def test_a_folder_of_something_else_is_not_taken(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty and holds no ablation"):
        WorkFolder(tmp_path).claim(ablation(), corpora=CORPORA)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_single_run_is_judged_by_what_its_objective_scores(tmp_path):
    file = tmp_path / "one.py"
    file.write_text(
        "from llm_jax.lab import Experiment\nfrom llm_jax.lab.components import Encoder, MaskedLM\n"
        "experiment = Experiment(model=Encoder(), objective=MaskedLM())\n"
    )
    assert load(file).metric == "valid/loss"
    file.write_text("from llm_jax.lab import Experiment\nexperiment = Experiment()\n")
    assert load(file).metric == "valid/bits_per_byte"
