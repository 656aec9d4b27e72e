"""Every file of `experiments/scale/` can be declared at every scale, and says how it is run."""

import pathlib

import pytest

from llm_jax.lab.experiment import load

FOLDER = pathlib.Path(__file__).parent.parent / "experiments" / "scale"
FITTED = ("scaling_law", "mup_transfer")  # populations of sizes, which run on any machine and make claims


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_it_is_declared_at_every_scale(file):
    declared = load(file)
    assert f"--experiment=experiments/scale/{file.name}" in file.read_text()
    for scale in (None, *declared.scales):
        assert set(declared.at_scale(scale).described(scale)["scientific"]) == set(declared.arms)


@pytest.mark.parametrize("name", FITTED)
def test_a_population_of_sizes_has_three_scales_and_grows(name):
    declared = load(FOLDER / f"{name}.py")
    assert set(declared.scales) == {"smoke", "small", "full"} and declared.claims
    for scale in declared.scales:
        at = declared.at_scale(scale)
        models = [at.experiment(arm).model for arm in at.arms]
        assert len({model.width for model in models}) == 4
        for model in models:
            assert model.mup is None or model.mup.base(model).attention.size(model.mup.base_width) > 0
