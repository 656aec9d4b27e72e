"""What transformers makes of chats: `python -m tests.golden.make_chat` writes `chat.json` (extra `parity`).

The templates are written for this table, each in the shape of a family of published ones. The tests hold llm_jax against the file;
a slow test makes it again and compares.
"""

import json
import pathlib
from typing import Any

FILE = pathlib.Path(__file__).with_name("chat.json")
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CONTROL = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<think>", "</think>"]

TEMPLATES = {
    # ChatML, as of Qwen and many others
    "chatml": """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    # the same over lines, whose indentation and line ends Jinja removes, with generation blocks
    "chatml, marked": """{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    # Llama 2 and Mistral: roles must take turns, the system's part goes into the first turn
    "turns": """{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}
{% else %}{% set system = none %}{% set rest = messages %}{% endif %}
{{ bos_token }}{% for message in rest %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + (('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n') if system and loop.first else '') + message['content'].strip() + ' [/INST]' }}
{% else %}
{% generation %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endgeneration %}
{% endif %}{% endfor %}""",
    # Gemma: the assistant is called model, and has no system
    "model": """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}
{{ '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}""",
    # Llama 3.1 and Qwen 2.5: tools as JSON, calls of them, their answers
    "tools": """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}{{ tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
    {{- tools | map(attribute='function.name') | join(', ') }}
    {{- tools[0] | tojson(indent=2) }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role }}
    {%- if message.content is defined and message.content %}{{ '\\n' + message.content }}{% endif %}
    {%- for call in message.tool_calls or [] %}
        {%- if call.function is defined %}{% set call = call.function %}{% endif %}
        {{- '\\n<call>{"name": "' }}{{ call.name }}{{ '", "arguments": ' }}{{ call.arguments | tojson(sort_keys=true) }}{{ '}</call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}""",
    # Qwen 3 and DeepSeek R1: reasoning is kept after the last question only; namespaces, reversed loops, slices, break
    "thinking": """{%- set ns = namespace(last=messages | length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}{% set ns.last = messages | length - 1 - loop.index0 %}{% set ns.found = true %}{% break %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set content = message.content if message.content is string else '' %}
    {%- set thought = '' %}
    {%- if message.reasoning_content is string %}{% set thought = message.reasoning_content %}
    {%- elif '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|' + message.role + '|>' }}
    {%- if message.role == 'user' %}{{ content }}{% continue %}{% endif %}
    {%- generation %}
    {%- if thought and loop.index0 > ns.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
    {{- content }}
    {%- endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}""",
    # LLaVA, Pixtral, Command R: blocks of content, documents, macros
    "blocks": """{%- macro shown(content) %}{% if content is string %}{{ content }}{% else %}{% for block in content -%}
{%- if block.type == 'image' %}{{ '<image>' }}{% else %}{{ block.text }}{% endif %}{% endfor %}{% endif %}{% endmacro -%}
{%- if documents %}{% for d in documents %}{{ 'Document: ' ~ loop.index ~ ' ' ~ d.title ~ ': ' ~ d.text | upper ~ '\\n' }}{% endfor %}{% endif %}
{%- for key, value in messages[0].items() | sort %}{{ key }};{% endfor %}
{%- for message in messages %}
{{ message.role | capitalize }}: {{ shown(message.content) }}{% if not loop.last %}{{ eos_token }}{% endif %}
{% endfor %}""",
}  # fmt: skip

USER, ANSWER = {"role": "user", "content": " Who's <there>? "}, {"role": "assistant", "content": " The naïve 日本 🙂 one.\n"}
SYSTEM = {"role": "system", "content": 'Be "brief" & kind.'}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "a < b's sum",
        "parameters": {"type": "object", "properties": {"é": {"type": "number"}}},
    },
}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"b": 2, "a": "é"}}}],
}
THOUGHT = {"role": "assistant", "content": "Four.", "reasoning_content": "two and\ntwo"}
WRITTEN = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nFive."}
OTHER = {"role": "assistant", "content": "Six.", "thinking": "so"}
BLOCKS = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is  this?"}]}
PROMPT, GO_ON = {"add_generation_prompt": True}, {"continue_final_message": True}

CASES: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
    *(
        (name, [USER], options)
        for name in ("chatml", "chatml, marked", "turns", "model", "thinking", "blocks")
        for options in ({}, PROMPT)
    ),
    *((name, [USER, ANSWER, USER], {}) for name in ("chatml", "chatml, marked", "turns", "model", "thinking", "blocks")),
    *((name, [SYSTEM, USER, ANSWER, USER, ANSWER], {}) for name in ("chatml", "chatml, marked", "turns", "thinking")),
    *((name, [USER, ANSWER], GO_ON) for name in ("chatml", "chatml, marked", "turns", "model")),
    ("tools", [USER, CALL, {"role": "tool", "content": "4"}, ANSWER], {"tools": [TOOL]}),
    ("tools", [USER, ANSWER], {}),
    ("thinking", [USER, THOUGHT, USER, WRITTEN, OTHER], {}),
    ("thinking", [USER, WRITTEN, USER], PROMPT | {"enable_thinking": False}),
    ("blocks", [BLOCKS, ANSWER], {"documents": [{"title": "T", "text": "text"}]}),
    ("blocks", [USER, BLOCKS], GO_ON),
    ("chatml, marked", [{"role": "user", "content": "a<|im_end|>b"}, {"role": "assistant", "content": ""}], {}),
]
REFUSED = [("turns", [USER, USER]), ("model", [SYSTEM, USER])]


def tokenizer_json() -> str:
    """Byte-level BPE with a few merges and the special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    merges = [("t", "h"), ("th", "e"), ("Ġ", "o"), ("Ã", "¯"), ("ï", "v"), ("æ", "Ĺ"), ("<", "|")]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *dict.fromkeys(a + b for a, b in merges)]
    known = set(pieces)
    merges = [(a, b) for a, b in merges if a in known and b in known]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [*SPECIALS.values(), *CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return tokenizer.to_str()


def made() -> list[dict[str, Any]]:
    """Text of each case, its ids, and the mask where the template marks what the assistant writes."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_json()), **SPECIALS)
    found = []
    for name, messages, options in CASES:
        given = {"conversation": messages, "chat_template": TEMPLATES[name], **options}
        marked = "generation %}" in TEMPLATES[name] and not options.get("continue_final_message")
        encoded = tokenizer.apply_chat_template(**given, return_dict=True, return_assistant_tokens_mask=marked)
        text = tokenizer.apply_chat_template(**given, tokenize=False)
        found.append({"text": text, "ids": encoded["input_ids"], "mask": encoded.get("assistant_masks")})
    return found


def main() -> None:
    """Writes the file, a case a line."""
    FILE.write_text("[\n" + ",\n".join(json.dumps(case, separators=(",", ":")) for case in made()) + "\n]\n")


if __name__ == "__main__":
    main()
