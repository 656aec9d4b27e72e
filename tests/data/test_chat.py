"""Chat templates: what transformers makes of a table of them, where the assistant's text is, and programs up to no good."""

import json
import pathlib

import numpy as np
import pytest

from llm_jax.core.config import ConfigError
from llm_jax.data import chat
from llm_jax.data.chat import Template
from llm_jax.data.tokenizer_json import FromJson
from llm_jax.data.tokenizers import Bytes
from tests.golden import make_chat as golden
from tests.golden import make_wordpiece

STORED = json.loads(golden.FILE.read_text())
USER, ANSWER = golden.USER, golden.ANSWER


@pytest.fixture(scope="module")
def tokenizer():
    return FromJson(golden.tokenizer_json(), specials=True)


@pytest.mark.parametrize("number", range(len(golden.CASES)))
def test_text_ids_and_mask_are_those_of_transformers(number, tokenizer):
    name, messages, options = golden.CASES[number]
    expected, template = STORED[number], Template(golden.TEMPLATES[name], golden.SPECIALS)
    assert chat.render(template, messages, **options).text == expected["text"]
    encoded = chat.encode(template, messages, tokenizer, **options)
    assert encoded.ids.tolist() == expected["ids"] and encoded.ids.dtype == np.int32
    if expected["mask"] is None:
        assert encoded.mask is None or options.get("continue_final_message")
    else:
        assert encoded.mask.astype(int).tolist() == expected["mask"]


def test_the_mask_holds_what_the_assistant_wrote(tokenizer):
    template = Template(golden.TEMPLATES["chatml, marked"])
    for one in (tokenizer, Bytes().fit(None, "")):
        encoded = chat.encode(template, [USER, ANSWER, USER, ANSWER], one)
        learned = b"".join(one.piece_bytes[i] for i in encoded.ids[encoded.mask])
        end = b"" if one is tokenizer else b"<|im_end|>"  # which is one id, and has no bytes
        assert learned == 2 * (ANSWER["content"].encode() + end)
    going_on = chat.encode(template, [USER, ANSWER], tokenizer, continue_final_message=True)
    assert b"".join(tokenizer.piece_bytes[i] for i in going_on.ids[going_on.mask]) == ANSWER["content"].encode()


@pytest.mark.parametrize("name, messages", golden.REFUSED)
def test_what_a_template_refuses_is_a_sentence(name, messages):
    sentence = {"turns": "Roles must alternate", "model": "System role not supported"}[name]
    with pytest.raises(ConfigError, match=f"chat template, line .* refuses these messages: {sentence}"):
        chat.render(Template(golden.TEMPLATES[name], golden.SPECIALS), messages)


ERRORS = {
    "{% for m in messages %}\n{% if %}": "chat template, line 2, cannot be read",
    "{% for m in messages %}": "line 1, cannot be read: Unexpected end of template",
    "a\n{{ messages[0].content + 1 }}": "chat template, line 2, fails on these messages: can only concatenate str",
    "{{ nothing.at_all }}": "fails on these messages: 'nothing' is undefined",
    "{{ raise_exception('') }}": "line 1, refuses these messages: TemplateError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "fails on these messages: maximum recursion depth",
    "{{ 1 / 0 }}": "fails on these messages: division by zero",
    "{{ messages | tojsn }}": "cannot be read: No filter named 'tojsn'",
    # up to no good
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "fails on these messages: access to attribute '__class__'",
    "{{ messages.append(1) }}": "fails on these messages: access to attribute 'append' of 'list' object is unsafe",
    "{% set messages[0].x = 1 %}": "cannot be read|fails on these messages",
    "{% set ns = namespace(__class__=1) %}": "takes no name that begins with an underscore",
    "{% set ns = namespace() %}{% set ns.__init__ = 1 %}": "takes no name that begins with an underscore",
    "{% for i in range(10 ** 9) %}{% endfor %}": "fails on these messages: Range too big",
    "{% include '/etc/passwd' %}": "fails on these messages: no loader",
}


@pytest.mark.parametrize("source", ERRORS)
def test_a_bad_template_is_one_sentence(source):
    with pytest.raises(ConfigError, match=ERRORS[source]) as caught:
        chat.render(Template(source), [USER])
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_what_a_template_must_not_see_is_not_there():
    for source in (
        "{{ ''.__class__ | attr('__mro__') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ '%s' | format(messages.__init__) }}",
    ):
        assert chat.render(Template(source), [USER]).text == "", source
    unseen = "{{ messages[0].content.x }}{{ messages.__len__ }}{{ environment }}{{ namespace.__init__ }}"
    assert chat.render(Template(unseen), [USER]).text == ""


def test_bad_messages_are_a_sentence():
    template = Template(golden.TEMPLATES["chatml"])
    for messages, options, sentence in [
        ([], {}, "messages must be a list of at least one dict"),
        ("hello", {}, "messages must be a list of at least one dict with a role and a content, got 'hello'"),
        ([{"content": "a"}], {}, r"messages\[0\] must be a dict with a role"),
        ([USER, "a"], {}, r"messages\[1\] must be a dict with a role"),
        ([USER | {"content": object()}], {}, "messages must be what JSON can hold"),
        ([USER], {"add_generation_prompt": True, "continue_final_message": True}, "choose one of the two"),
        ([USER | {"content": []}], {"continue_final_message": True}, "has no text to continue"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            chat.render(template, messages, **options)
    with pytest.raises(ConfigError, match="does not show the last message as it is"):
        chat.render(Template("{{ messages[0].content[:3] }}"), [USER], continue_final_message=True)


def test_the_messages_stay_as_they_are():
    messages = [USER, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    before = json.dumps(messages)
    chat.render(Template("{{ messages[1].content[0].text }}"), messages, continue_final_message=True)
    assert json.dumps(messages) == before


def test_a_folder_has_its_template(tmp_path):
    template = "{{ bos_token }}{{ messages[0].content }}"
    config = {"chat_template": template, "bos_token": {"content": "<s>"}, "eos_token": None, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert chat.render(chat.load(tmp_path), [USER]).text == "<s>" + USER["content"]
    config["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert chat.load(tmp_path).source == template and chat.load(tmp_path).specials == {"bos_token": "<s>"}
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}x")
    assert chat.render(chat.load(tmp_path), [USER]).text == "x"
    assert chat.load(tmp_path / "chat_template.jinja") == Template("{{ eos_token }}x")
    with pytest.raises(ConfigError, match="has no chat template"):
        chat.load(pathlib.Path(__file__).parent)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_golden_files_are_what_transformers_does():
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    assert golden.made() == STORED
    assert json.loads(make_wordpiece.FILE.read_text()) == make_wordpiece.made()

    library = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(golden.tokenizer_json()), **golden.SPECIALS)
    for name, messages in golden.REFUSED:
        with pytest.raises(Exception, match=r"Roles must|System role"):
            library.apply_chat_template(messages, chat_template=golden.TEMPLATES[name])
