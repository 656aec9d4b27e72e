"""Presets: as large as published, the same models as transformers' configurations describe, and reached from experiment files."""

import json
import math
import pathlib

import jax
import pytest

from llm_jax.core.config import ConfigError, override
from llm_jax.core.sharding import unbox
from llm_jax.io import huggingface
from llm_jax.io.huggingface.family import normal
from llm_jax.lab.experiment import load
from llm_jax.models import count, presets
from llm_jax.models.heads import SequenceClassifier
from llm_jax.models.model import abstract_parameters
from llm_jax.models.presets import PRESETS

COUNTED = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "counts.json").read_text())  # tests/golden/make_counts.py
# what papers and model cards print: (parameters, of these active), and how far that may be off by rounding or by what is counted
PRINTED = {
    "transformer-base": (65e6, None, 0.04),
    "transformer-big": (213e6, None, 0.01),
    "lstm-medium": (20e6, None, 0.02),
    "lstm-large": (66e6, None, 0.01),
    "llama2-7B": (6.7e9, None, 0.01),
    "llama2-13B": (13.0e9, None, 0.01),
    "llama2-70B": (69e9, None, 0.01),
    "qwen2-0.5B": (0.49e9, None, 0.01),
    "qwen2-1.5B": (1.54e9, None, 0.01),
    "qwen2-7B": (7.61e9, None, 0.01),
    "gemma3-4B": (0.675e9 + 3.209e9, None, 0.002),
    "gemma3-12B": (1.012e9 + 10.759e9, None, 0.002),
    "gemma3-27B": (1.416e9 + 25.6e9, None, 0.002),
    "mixtral-8x7B": (46.7e9, 12.9e9, 0.005),
    "qwen3-30B-A3B": (30.5e9, 3.3e9, 0.02),
    "deepseek-v3": (671e9, 37e9, 0.02),
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_published(name):
    preset = PRESETS[name]
    model = preset.model()
    assert count.parameters(model, preset.vocabulary) == preset.parameters == COUNTED[name]["parameters"]
    tree = unbox(abstract_parameters(model.with_layers("scanned"), preset.vocabulary))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) == preset.parameters


def test_every_preset_is_counted_elsewhere():
    assert sorted(COUNTED) == sorted(PRESETS)
    functions = {getattr(preset.model, "func", preset.model) for preset in PRESETS.values()}
    assert functions == {getattr(presets, name) for name in presets.__all__ if name.islower()}


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.active])
def test_active_parameters_are_those_published(name):
    preset = PRESETS[name]
    assert count.active_parameters(preset.model(), preset.vocabulary) == preset.active == COUNTED[name]["active"]


@pytest.mark.parametrize("name", PRINTED)
def test_sizes_round_to_what_papers_print(name):
    total, active, tolerance = PRINTED[name]
    assert PRESETS[name].parameters == pytest.approx(total, rel=tolerance)
    assert active is None or PRESETS[name].active == pytest.approx(active, rel=tolerance)


@pytest.mark.parametrize("name", [name for name, entry in COUNTED.items() if "config" in entry])
def test_a_preset_is_what_its_config_json_describes(name, tmp_path):
    config = COUNTED[name]["config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    described, vocabulary = huggingface.read_config(tmp_path)
    preset = PRESETS[name]
    assert normal(described) == normal(preset.model()) and vocabulary == preset.vocabulary


def test_deepseeks_module_for_a_second_token_has_11_5_billion_of_its_own():
    """The release's README_WEIGHTS.md; the embedding and the output matrix are the main model's."""
    vocabulary = PRESETS["deepseek-v3"].vocabulary
    more = count.parameters(presets.deepseek_v3(ahead=1), vocabulary) - PRESETS["deepseek-v3"].parameters
    assert more == pytest.approx(11.5e9, rel=0.01)


def test_of_deepseeks_module_for_a_second_token_a_token_meets_one_sparse_layer():
    model, vocabulary = presets.deepseek_v3(ahead=1), PRESETS["deepseek-v3"].vocabulary
    more = count.active_parameters(model, vocabulary) - PRESETS["deepseek-v3"].active
    layer, width = model.in_full[-1], model.width
    used = layer.attention.parameters(width) + layer.ffn.parameters(width) - layer.ffn.idle(width)
    assert more == used + 2 * width**2 + 5 * width, "the joining matrix, two norms of the layer and three of the module"


def test_a_pooled_bert_is_as_large_as_transformers_one():
    """BertForSequenceClassification of bert-base-uncased with two labels has 109,483,778."""
    model = override(presets.bert(), {"head": SequenceClassifier(labels=2, pooling="first", transform="tanh")})
    assert count.parameters(model, 30_522) == 109_483_778


def test_an_experiment_file_takes_a_preset_and_scales_it_down(tmp_path):
    file = tmp_path / "small.py"
    file.write_text(
        '''"""A small Llama."""
from llm_jax.core.config import override
from llm_jax.lab.experiment import Experiment
from llm_jax.models import presets

experiment = Experiment(model=override(presets.llama3(), {
    "width": 64, "depth": 2, "attention.heads": 4, "attention.kv_heads": 1, "ffn.units": 96,
}))
'''
    )
    model = load(file).base.model
    assert (model.depth, model.attention.groups, model.position.theta) == (2, 1, 500_000.0)
    tree = unbox(abstract_parameters(model, 256))
    assert tree["layers_0" if not model.scanned else "layers"]["ffn"]["gate"]["kernel"].shape[-2:] == (64, 96)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: presets.gpt2("125M"), "preset has no size '125M': did you mean 124M"),
        (lambda: override(presets.gpt2(), {"width": 700}), "attention.heads must divide width=700"),
        (lambda: override(presets.deepseek_v3(), {"depth": 2}), "first describes 3 layers, but depth=2"),
    ],
)
def test_mistakes_are_sentences(make, sentence):
    with pytest.raises(ConfigError) as error:
        make()
    assert sentence in str(error.value)
