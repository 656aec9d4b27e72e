"""A config.json read strictly: every key is understood, known to leave the arithmetic alone, or an error."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

from llm_jax.core.config import ConfigError

REQUIRED = object()

# keys that a forward pass never looks at: what the model is called, how it was drawn and trained, how text is generated from it
HARMLESS = re.compile(
    "|".join(
        (
            r"_name_or_path|_commit_hash|architectures|model_type|auto_map|transformers_version|dtype|torch_dtype|torchscript",
            r"_?attn_implementation|_attn_implementation_autoset|_experts_implementation|cache_implementation|use_cache|use_bfloat16",
            r"gradient_checkpointing|pretraining_tp|slow_but_exact|output_(attentions|hidden_states|router_logits|past)",
            r"(use_)?return_dict|initializer_(range|factor)|init_method|use_scaled_init_method|seq_length|n_ctx|n_positions|max_position_embeddings",
            r"\w*dropout(_rate|_prob)?|\w+_pdrop|router_jitter_noise|router_aux_loss_coef|seq_aux|aux_loss_alpha",
            r"(bos|eos|pad|sep|cls|mask|unk|decoder_start|forced_bos|forced_eos)_token_id|tokenizer_class|prefix",
            r"summary_\w+|num_labels|id2label|label2id|problem_type|finetuning_task|language|task_specific_params|ep_size",
            r"(max|min)_length|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature|top_[kp]|typical_p",
            r"repetition_penalty|length_penalty|(encoder_)?no_repeat_ngram_size|bad_words_ids|begin_suppress_tokens|suppress_tokens",
            r"num_return_sequences|output_scores|return_dict_in_generate|remove_invalid_values|exponential_decay_length_penalty",
            r"reorder_and_upcast_attn|vocab_size|unsloth_\w+|is_llama_config|transformers\.js_config",
        )
    )
)
# keys of any family, and the values at which they change nothing
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "chunk_size_feed_forward": (0,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "rope_scaling": (None,),
    "sliding_window": (None,),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False,),
    "use_sliding_window": (False,),
}


class Fields:
    """The keys of a config.json, or of an object inside it, of which it remembers the ones that were read. tensors: names of
    those that lie beside it, where they are known."""

    def __init__(self, values: Mapping[str, Any], where: str, tensors: Collection[str] | None = None):
        self.values, self.where, self.tensors = dict(values), where, tensors
        self._read: set[str] = set()
        self._inner: list[Fields] = []

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """The value; `default` where the key is absent. Raises `ConfigError` where it has none."""
        self._read.add(name)
        if name not in self.values and default is REQUIRED:
            raise ConfigError(f"must be given: this family has no default for it ({self.where})", name)
        return self.values.get(name, default)

    def choose(self, name: str, table: Mapping[Any, Any], default: Any = REQUIRED) -> Any:
        """What `table` has for the value. Raises `ConfigError` where it has nothing."""
        value = self.get(name, default)
        if value not in table:
            raise ConfigError(f"must be one of {', '.join(map(repr, table))}, got {value!r} ({self.where})", name)
        return table[value]

    def inside(self, name: str) -> Fields:
        """The object under a key; its own keys must be understood as well."""
        value = self.get(name)
        if not isinstance(value, Mapping):
            raise ConfigError(f"must be an object, got {value!r} ({self.where})", name)
        self._inner.append(Fields(value, f"{name} in {self.where}"))
        return self._inner[-1]

    def rename(self, synonyms: Mapping[str, str]) -> None:
        """Keys under other names take those that are read. Raises `ConfigError` where both are there and differ."""
        for other, name in synonyms.items():
            if other in self.values:
                value = self.values.pop(other)
                if self.values.setdefault(name, value) != value:
                    raise ConfigError(
                        f"is {value!r}, and {name}, which is the same, is {self.values[name]!r} ({self.where})", other
                    )

    def expect(self, name: str, *values: Any) -> None:
        """Raises `ConfigError` where the key is present with another value than these, at which it changes nothing."""
        value = self.get(name, values[0])
        if value not in values:
            raise ConfigError(f"is {value!r}, which changes the arithmetic and is not supported here ({self.where})", name)

    def agree(self, name: str, value: Any, other: Any) -> None:
        """Raises `ConfigError` unless what a key says is what another has said."""
        if value != other:
            raise ConfigError(f"says {value!r}, and rope_parameters says {other!r}: remove one ({self.where})", name)

    def finish(self) -> None:
        """Raises `ConfigError` for a key that nobody read, unless it leaves the arithmetic alone."""
        for name in sorted(set(self.values) - self._read):
            if name in WITHOUT_EFFECT:
                self.expect(name, *WITHOUT_EFFECT[name])
            elif not HARMLESS.fullmatch(name):
                raise ConfigError(
                    f"is {self.values[name]!r}, a key that is not known here: it may change the arithmetic ({self.where})", name
                )
        for inner in self._inner:
            inner.finish()


def harmless(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that leave the arithmetic alone, such as token ids and label names."""
    return {name: value for name, value in values.items() if HARMLESS.fullmatch(name)}


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `ConfigError`."""
    try:
        values = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"has no {file.name}: a model's folder as `save_pretrained` writes it has one", str(file.parent)
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"cannot be read as JSON: {error}", str(file)) from None
    if not isinstance(values, dict):
        raise ConfigError(f"must hold an object, got {type(values).__name__}", str(file))
    return values
