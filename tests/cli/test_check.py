"""`python -m llm_jax check`: a table with one row a check, exit code 1 where one failed, a sentence where it cannot."""

import functools

import pytest

from llm_jax.models.decoder import Decoder
from llm_jax.nn.position import Rope
from llm_jax.nn.rope import DynamicScaling
from llm_jax.train import check
from llm_jax.train.check import Finding
from tests.cli.outcome import outcome

SMALL = "Decoder(width=8, depth=1, attention=Attention(heads=2), layers=scanned)"
FILE = '''"""Two arms."""
from llm_jax.lab.experiment import Ablation, Experiment
from llm_jax.models.decoder import Decoder
from llm_jax.nn.multihead import Attention
from llm_jax.nn.position import Alibi, Rope

ablation = Ablation("?", Experiment(model=Decoder(width=8, depth=1, attention=Attention(heads=2))),
                    {"model.position": {"rope": Rope(), "alibi": Alibi()}})
'''


run = functools.partial(outcome, "check")


def test_a_model_as_typed_is_checked(monkeypatch, capsys):
    code, out, err = run([f"--model={SMALL}", "--length=6", "--vocabulary=16"], monkeypatch, capsys)
    assert code == 0 and all(line.startswith("checked: ") for line in err.splitlines())
    rows = ["counted parameters", "finite differences", "unrolled", "recomputed", "later one", "decoding", "float32", "bfloat16"]
    assert [next(i for i, line in enumerate(out.splitlines()) if row in line) for row in rows] == list(range(3, 3 + len(rows)))
    assert out.count("│ ok") == len(rows) and "1e-06" in out


@pytest.fixture
def checked(monkeypatch):
    """What was given to the checks, which find one mistake, one thing that is right, and one that does not apply."""
    given = []

    def subject(model, objective=None, **sizes):
        given.append((model, objective, sizes))

    found = [Finding("first", 0.5, 1e-6, "layers_0/attention/query/kernel"), Finding("second", 0.0, 0.0), Finding("third", None)]
    monkeypatch.setattr(check, "subject", subject)
    monkeypatch.setattr(check, "findings", lambda _: iter(found))
    return given


def test_a_failed_check_names_the_leaf_and_ends_with_1(checked, monkeypatch, capsys):
    code, out, _ = run([f"--model={SMALL}", "--rows=3"], monkeypatch, capsys)
    first, second, third = (next(line for line in out.splitlines() if name in line) for name in ("first", "second", "third"))
    assert code == 1
    assert "5.0e-01" in first and "1e-06" in first and "FAILED" in first and "layers_0/attention/query/kernel" in first
    assert "ok" in second and "ok" not in third and "FAILED" not in third
    assert checked[0][0].layers == "scanned" and checked[0][2]["rows"] == 3


def test_an_arm_of_an_experiment_is_checked_with_its_objective(checked, monkeypatch, capsys, tmp_path):
    (tmp_path / "two.py").write_text(FILE)
    where = f"--experiment={tmp_path / 'two.py'}"
    run([where], monkeypatch, capsys)
    run([where, "--arm=alibi", "--set=model.depth=3", "--set=objective=Continuation()"], monkeypatch, capsys)
    (base, objective, _), (arm, other, _) = checked
    assert (type(base.position).__name__, base.depth, type(objective).__name__) == ("Rope", 1, "NextToken")
    assert (type(arm.position).__name__, arm.depth, type(other).__name__) == ("Alibi", 3, "Continuation")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ([], 'check needs either --model="Decoder(width=32, depth=2)" or --experiment=PATH'),
        (["--model=Decoder()", "--experiment=x.py"], "or --experiment=PATH, and not both"),
        (["--model=Decodr()"], "--model has no choice 'Decodr': did you mean Decoder"),
        (["--model=Decoder(width=7)"], "--model.attention.heads must divide width=7"),
        (["--model=Decoder(position=Roppe())"], "--model.position has no choice 'Roppe': did you mean Rope"),
        (["--model=Decoder()", "--set=model.depth=2"], "--set changes an experiment: write it into --model instead"),
        (["--model=Decoder()", "--arm=a"], "--arm changes an experiment: write it into --model instead"),
        (["--model=Decoder()", "--vocabulary=5"], "vocabulary must be at least twice length=16, got 5"),
        (["--experiment={folder}/two.py", "--arm=alibli"], "--arm names the arm 'alibli', but the arms are rope, alibi"),
        (["--experiment=nowhere.py"], "nowhere.py is no file"),
    ],
)
def test_a_mistake_is_one_sentence(flags, sentence, tmp_path, monkeypatch, capsys):
    (tmp_path / "two.py").write_text(FILE)
    code, out, err = run([flag.replace("{folder}", str(tmp_path)) for flag in flags], monkeypatch, capsys)
    assert code == 2 and sentence in err and "\n" not in err and not out, err


@pytest.mark.parametrize("original, reason", [(4, "how far a token is turned depends on how long its row is"), (16, "")])
def test_a_row_that_stretches_as_it_grows_is_not_decoded(original, reason):
    model = Decoder(width=8, depth=1, position=Rope(scaling=DynamicScaling(original_length=original)))
    assert check._no_decoding(model, 16) == reason
