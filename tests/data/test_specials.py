"""Ids for tokens that no text spells: those that a vocabulary has, or new ones after its last."""

import io
import json

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import models

from llm_jax.data.tokenizer_json import HuggingFace
from llm_jax.data.tokenizers import Bytes, SentencePiece, Special
from llm_jax.io import tokenizer_json

MASK, FIRST = Special(("[MASK]", "<mask>")), Special(("<extra_id_0>",))


def test_new_ids_come_after_the_last_and_stand_for_nothing():
    plain = Bytes().fit(None, "")
    wider = plain.with_specials((MASK, FIRST))
    assert (plain.vocabulary, wider.vocabulary, wider.specials) == (257, 259, {"[MASK]": 257, "<extra_id_0>": 258})
    assert wider.byte_lengths.tolist() == [1] * 256 + [0] * 3 and len(wider.kinds) == 259
    assert plain.specials == {} and len(plain.byte_lengths) == 257, "the other stays as it was"
    np.testing.assert_array_equal(wider.encode("[MASK]"), plain.encode("[MASK]"))
    assert wider.fingerprint == plain.fingerprint and plain.with_specials(()) is plain
    assert wider.with_specials((FIRST,)) is wider


def test_ids_of_a_tokenizer_json_are_used(tmp_path):
    library = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "<mask>": 2}, unk_token="[UNK]"))
    library.add_special_tokens(["<mask>"])
    library.save(str(tmp_path / "tokenizer.json"))
    fitted = HuggingFace(path=str(tmp_path)).fit(None, "").with_specials((MASK, FIRST))
    assert (fitted.vocabulary, fitted.specials) == (4, {"[MASK]": 2, "<extra_id_0>": 3})


def test_ids_of_a_sentencepiece_model_are_used(tmp_path):
    model = io.BytesIO()
    given = {
        "vocab_size": 300,
        "byte_fallback": True,
        "hard_vocab_limit": False,
        "control_symbols": ["<extra_id_0>"],
        "minloglevel": 2,
    }
    texts = ["the cat sat on the mat", "many small numbers add up"] * 10
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **given)
    (tmp_path / "t.model").write_bytes(model.getvalue())
    plain = SentencePiece(path=str(tmp_path / "t.model")).fit(None, "")
    fitted = plain.with_specials((MASK, FIRST))
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert fitted.specials == {"[MASK]": plain.vocabulary, "<extra_id_0>": processor.piece_to_id("<extra_id_0>")}
    assert fitted.vocabulary == plain.vocabulary + 1


def test_they_are_written_into_the_tokenizer_json():
    described = tokenizer_json.describe(Bytes().fit(None, "").with_specials((MASK,)))
    library = tokenizers.Tokenizer.from_str(json.dumps(described))
    assert library.token_to_id("[MASK]") == 257 and library.encode("a[MASK]é").ids == [97, 257, *"é".encode()]
