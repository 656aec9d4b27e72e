"""The golden models with other weights, made by transformers here and loaded by it again: `pip install -e ".[parity]"`."""

import json

import numpy as np
import pytest

from llm_jax.io import huggingface
from tests.golden import make_huggingface as golden
from tests.io.test_huggingface import OTHER_FORMS, assert_equal_logits, drawn, logits, run

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")
pytestmark = pytest.mark.slow

EVERYWHERE = ["llama", "qwen3-window", "gemma3", "deepseek-v3", "t5-gated", "bert-sequence"]  # also where the family is not named


@pytest.mark.parametrize("case", golden.ALL)
@pytest.mark.filterwarnings("ignore")
def test_there_and_back(case, tmp_path):
    theirs, given = golden.build(case, seed=1), golden.inputs(case, seed=1)
    expected = golden.logits(theirs, given)
    theirs.save_pretrained(tmp_path / "theirs")
    model, vocabulary, params = huggingface.load(tmp_path / "theirs", layers="unrolled")
    assert_equal_logits(logits(model, vocabulary, params, given), given, expected)

    kind = json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"]
    settings = huggingface.settings(tmp_path / "theirs")
    huggingface.export(model, vocabulary, params, tmp_path / "ours", family=kind, settings=settings, max_shard_bytes=6000)
    again, told = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager", output_loading_info=True)
    assert not any(told[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    again.set_experts_implementation("eager") if hasattr(again, "set_experts_implementation") else None
    assert_equal_logits(golden.logits(again.eval(), given), given, expected)


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.filterwarnings("ignore")
def test_the_family_that_is_found_computes_the_same(case, tmp_path):
    given = golden.inputs(case)
    model, vocabulary, params = huggingface.load(golden.FOLDER / case, layers="scanned")
    huggingface.export(model, vocabulary, params, tmp_path / "ours", settings={"pad_token_id": 0})
    name = json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"][0]
    again = getattr(transformers, name).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    again.set_experts_implementation("eager") if hasattr(again, "set_experts_implementation") else None
    assert_equal_logits(golden.logits(again, given), given, golden.logits(golden.build(case), given))


@pytest.mark.parametrize("family, model", OTHER_FORMS.values(), ids=OTHER_FORMS)
@pytest.mark.filterwarnings("ignore")
def test_models_of_our_own_in_a_form_that_it_has(family, model, tmp_path):
    import torch

    params = drawn(model)
    huggingface.export(model, 12, params, tmp_path / "ours")
    name = json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"][0]
    theirs, told = getattr(transformers, name).from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(told[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    theirs.set_experts_implementation("eager") if hasattr(theirs, "set_experts_implementation") else None
    tokens, expected = run(model, params)
    with torch.no_grad():
        found = theirs.eval()(input_ids=torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_bfloat16_files_of_transformers(tmp_path):
    theirs, given = golden.build("qwen3"), golden.inputs("qwen3")
    theirs.bfloat16().save_pretrained(tmp_path / "theirs")
    model, vocabulary, params = huggingface.load(tmp_path / "theirs", layers="unrolled")
    rounded = type(theirs).from_pretrained(tmp_path / "theirs", dtype="float32", attn_implementation="eager").eval()
    np.testing.assert_array_equal(params["embedding"]["embedding"], rounded.get_input_embeddings().weight.detach().numpy())
    assert_equal_logits(logits(model, vocabulary, params, given), given, golden.logits(rounded, given))


@pytest.mark.filterwarnings("ignore")
def test_the_words_of_a_bert_for_pretraining(tmp_path):
    import torch

    theirs = transformers.BertForPreTraining(transformers.BertConfig(**golden.LAYER_NORM)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model, vocabulary, params = huggingface.load(tmp_path / "theirs", layers="unrolled")
    given = golden.inputs("bert")
    with torch.no_grad():
        found = theirs(
            input_ids=torch.tensor(given["tokens"]).long(),
            attention_mask=torch.tensor(given["mask"]).long(),
            token_type_ids=torch.tensor(given["types"]).long(),
            position_ids=(torch.tensor(given["mask"]).cumsum(-1) - 1).clip(0),
        ).prediction_logits.numpy()
    assert_equal_logits(logits(model, vocabulary, params, given), given, found)
