"""What a family is: a preset, the keys of its config.json as fields of the model, and the names of its tensors."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llm_jax.core.config import ConfigError, differences, override
from llm_jax.io.huggingface.fields import REQUIRED, Fields
from llm_jax.io.huggingface.names import Row
from llm_jax.models.block import Layer
from llm_jax.models.encoder_decoder import EncoderDecoder
from llm_jax.models.heads import Head, LanguageModel, TokenClassifier
from llm_jax.models.model import Model
from llm_jax.nn.dispatch import Dropless
from llm_jax.nn.dropout import Dropout
from llm_jax.nn.ffn import Dense, Gated
from llm_jax.nn.latent import MLA
from llm_jax.nn.linear import Precision
from llm_jax.nn.moe import MoE
from llm_jax.nn.multihead import Attention
from llm_jax.nn.position import Rope
from llm_jax.nn.routing import Sigmoid


class Unlike(ConfigError):
    """The model has something that the family has not. wants: what all would have to be otherwise; kinds: of these, components of
    another class."""

    def __init__(self, problem: str, path: str = "", wants: Sequence[str] = (), kinds: int = 0):
        super().__init__(problem, path)
        self.wants, self.kinds = tuple(wants) or (f"{path} that it can say",), kinds


@dataclass(frozen=True)
class Key:
    """A key of config.json and the fields of the model that say the same.

    default: where the key is absent. table: value there → value here, where the two differ; `back` prefers one way back where
    several lead there. words: only of models with a language-model head; others ignore it.
    spare: left out where the value is None.
    """

    name: str
    paths: tuple[str, ...]
    default: Any = REQUIRED
    table: Mapping[Any, Any] | None = None
    back: Mapping[Any, Any] = field(default_factory=dict)
    words: bool = False
    spare: bool = False

    def read(self, fields: Fields) -> dict[str, Any]:
        """Changes to the preset."""
        if self.table is not None:
            return dict.fromkeys(self.paths, fields.choose(self.name, self.table, self.default))
        return dict.fromkeys(self.paths, fields.get(self.name, self.default))

    def write(self, model: Model) -> dict[str, Any]:
        """The key with its value."""
        try:
            value = functools.reduce(getattr, self.paths[0].split("."), model)
        except AttributeError:
            raise Unlike(f"is what {self.name} says, and the model has no such field", self.paths[0]) from None
        if self.table is None:
            return {} if self.spare and value is None else {self.name: value}
        inverse = {here: there for there, here in self.table.items()} | dict(self.back)
        if value not in inverse:
            ways = f"{self.paths[0]}={' or '.join(map(repr, inverse))}"
            raise Unlike(f"is {value!r}, for which {self.name} has no value", self.paths[0], [ways])
        return {self.name: inverse[value]}


def key(name: str, *paths: str, **more: Any) -> Key:
    """A `Key` with its paths written one after another."""
    return Key(name, paths, **more)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A `model_type` of transformers.

    heads: architecture → head; the first is the usual one. read: what takes more than a table of keys, from the model so far;
    write: its inverse. rows: for the model and its config.json. ignored: patterns of tensors without use ({depth}: of layers);
    renames: (pattern, replacement) from names that other versions write to those of `rows`. layers: classes of
    feed-forward networks that layers may have besides the preset's. synonyms: other names of keys → those that are read here.
    unread: keys in its files that no version of the code reads. copies: (tensor, the one that it repeats), of those written.
    wide: pattern of the parameters that stay float32 → the dtypes of the others at which they do.
    """

    kind: str
    preset: Model
    heads: Mapping[str, Head]
    keys: tuple[Key, ...]
    rows: Callable[[Model, Mapping[str, Any]], tuple[Row, ...]]
    read: Callable[[Fields, Any], Any] = lambda fields, model: model
    write: Callable[[Any], dict[str, Any]] = lambda model: {}
    ignored: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    layers: tuple[type, ...] = ()
    synonyms: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    wide: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def model(self, fields: Fields) -> Model:
        """The configuration that a config.json describes. Raises `ConfigError`."""
        fields.rename(self.synonyms)
        for name in self.unread:
            fields.get(name, None)
        architecture = (fields.get("architectures", None) or [next(iter(self.heads))])[0]
        if architecture not in self.heads:
            raise ConfigError(f"must be one of {', '.join(self.heads)}, got {architecture!r} ({fields.where})", "architectures")
        head = self.heads[architecture]
        if isinstance(head, TokenClassifier):
            head = replace(head, labels=_labels(fields))
        changes: dict[str, Any] = {"head": head}
        for entry in self.keys:
            found = entry.read(fields)
            changes |= {} if entry.words and not isinstance(head, LanguageModel) else found
        try:
            model = self.read(fields, override(self.preset, changes))
        except ConfigError as error:
            raise error if fields.where in error.problem else ConfigError(f"{error} ({fields.where})") from None
        fields.finish()
        return model

    def config(self, model: Model) -> dict[str, Any]:
        """The config.json of a model. Raises `Unlike` unless it describes the model, and nothing else."""
        self._check_kinds(model)
        model = _based(model, self.preset)
        found = {"model_type": self.kind, "architectures": [self._architecture(model.head)]}
        for entry in self.keys:
            found |= {} if entry.words and not isinstance(model.head, LanguageModel) else entry.write(model)
        if isinstance(model.head, TokenClassifier):
            names = [f"LABEL_{i}" for i in range(model.head.labels)]
            found |= {
                "id2label": {str(i): name for i, name in enumerate(names)},
                "label2id": {name: i for i, name in enumerate(names)},
            }
        found |= self.write(model)
        again = self.model(Fields(found, "config.json"))
        unlike = differences(normal(again), normal(model))
        if unlike:
            path, (there, here) = next(iter(unlike.items()))
            wants = [f"{name}={value!r}" for name, (value, _) in unlike.items() if name != "pattern"] or ["other layers"]
            raise Unlike(f"is {here!r}, which {self.kind} cannot say: it would be {there!r}", path, wants)
        return found

    def dtype(self, path: str, dtype: str) -> str:
        """What a parameter is read and written as where the others are `dtype`."""
        is_wide = any(dtype in narrow and re.search(pattern, path) for pattern, narrow in self.wide.items())
        return "float32" if is_wide else dtype

    def _architecture(self, head: Head) -> str:
        found = next((name for name, own in self.heads.items() if type(own) is type(head)), None)
        if found is None:
            raise Unlike(f"is {head!r}, and {self.kind} has only {', '.join(self.heads)}", "head", ["another head"], 1)
        return found

    def _check_kinds(self, model: Model) -> None:
        """Raises `Unlike` where a component is of another class than the preset's."""
        if type(model) is not type(self.preset):
            names = type(model).__name__, type(self.preset).__name__
            raise Unlike(f"is a {names[0]}, {self.kind} is a {names[1]}", "model", [f"a {names[1]}"], 9)
        found: dict[str, tuple[str, str]] = {}
        for path, component, kinds in self._components(model):
            if type(component) not in kinds:
                found.setdefault(path, (type(component).__name__, " or ".join(kind.__name__ for kind in kinds)))
        if found:
            path, (here, there) = next(iter(found.items()))
            wants = [f"{name}={kinds}" for name, (_, kinds) in found.items()]
            raise Unlike(f"is a {here}, {self.kind} has {there}", path, wants, len(found))

    def _components(self, model: Model) -> Iterator[tuple[str, Any, tuple[type, ...]]]:
        """Path and component of whatever has a class, and the classes that the family has there."""
        for (path, ours), theirs in zip(model.stacks.items(), self.preset.stacks.values(), strict=True):
            for name in ("norm", "position", "residual"):
                yield f"{path}.{name}" if path else name, getattr(ours, name), (type(getattr(theirs, name)),)
            for layer in ours.in_full:
                yield "attention", layer.attention, (type(theirs.attention),)
                yield "ffn", layer.ffn, (type(theirs.ffn), *self.layers)
                yield "position", layer.position, (type(theirs.position),)


def _based(model: Any, preset: Any) -> Any:
    """The same model, with what layers have in common in the stack: components of the preset's classes, if any layer has one."""
    if isinstance(model, EncoderDecoder):
        across = model.across
        return replace(
            model, encoder=_based(model.encoder, preset.encoder), decoder=_based(model.decoder, preset.decoder), cross=across
        )
    layers = [replace(layer, ffn=_sized(layer.ffn, model.width)) for layer in model.in_full]
    model = replace(model, ffn=_sized(model.ffn, model.width))
    ffn = next((ffn for ffn in (*(layer.ffn for layer in layers), model.ffn) if type(ffn) is type(preset.ffn)), layers[0].ffn)
    attention = layers[0].attention
    if isinstance(attention, Attention):
        attention = replace(attention, kv_heads=attention.groups)
        if preset.attention.head_dim is not None:  # which a file without it would mean
            attention = replace(attention, head_dim=attention.size(model.width))
    return replace(model, attention=attention, ffn=ffn, first=(), pattern=tuple(layers))


def _sized(ffn: Any, width: int) -> Any:
    """The feed-forward network with its units as a number, which is what files have."""
    if isinstance(ffn, MoE):
        return replace(ffn, expert=_sized(ffn.expert, width), shared=ffn.shared and _sized(ffn.shared, width))
    return replace(ffn, units=ffn.hidden(width)) if isinstance(ffn, (Dense, Gated)) else ffn


def _labels(fields: Fields) -> int:
    names = fields.get("id2label", None)
    return len(names) if names else fields.get("num_labels", 2)


# ── what computes the same ───────────────────────────────────────────────────────────────────────────────────────────
def normal(model: Any) -> Any:
    """The model that computes the same, written in one way: layers in full, defaults written out, no first draw and no training."""
    model = replace(model, head=replace(model.head, gain=1.0))
    if isinstance(model, EncoderDecoder):
        across = _plain(model.across, model.width)
        return replace(model, encoder=_plain_stack(model.encoder), decoder=_plain_stack(model.decoder), cross=across)
    return _plain_stack(model)


def _plain_stack(stack: Any) -> Any:
    layers = tuple(
        Layer(_plain(layer.attention, stack.width), _plain(layer.ffn, stack.width), layer.position) for layer in stack.in_full
    )
    position = layers[0].position if isinstance(stack.position, Rope) else stack.position
    return replace(
        stack,
        attention=layers[0].attention,
        ffn=layers[0].ffn,
        position=position,
        first=(),
        pattern=layers,
        layers="auto",
        remat="none",
        precision=Precision(),
        dropout=Dropout(),
    )


def _plain(part: Any, width: int) -> Any:
    """A mixer or feed-forward network with its defaults written out."""
    if isinstance(part, Attention):
        written = {"kv_heads": part.groups, "head_dim": part.size(width), "output_bias": part.biased_output}
        return replace(part, **written, scale=part.scale or part.size(width) ** -0.5, backend="auto")
    if isinstance(part, MLA):
        return replace(part, backend="auto")
    if isinstance(part, MoE):
        router = replace(part.router, bias_rate=0.0) if isinstance(part.router, Sigmoid) else part.router
        dispatch = Dropless() if isinstance(part.dispatch, Dropless) else part.dispatch
        networks = {"expert": _plain(part.expert, width), "shared": part.shared and _plain(part.shared, width)}
        return MoE(experts=part.experts, active=part.active, router=router, dispatch=dispatch, **networks)
    if isinstance(part, Dense):
        return Dense(units=part.hidden(width), activation=part.activation, bias=part.bias)
    if isinstance(part, Gated):
        return Gated(units=part.hidden(width), activation=part.activation, bias=part.bias)
    return part
