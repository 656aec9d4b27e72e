"""Maximal update parametrization (Yang et al. 2022, "Tensor Programs V"): rates tuned on a narrow model serve a wide one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax

from llm_jax.core.config import Config, ConfigError, override, require, require_positive
from llm_jax.core.sharding import unbox
from llm_jax.models.block import Layer
from llm_jax.models.model import abstract_parameters, input_output_axes, parameter_roles
from llm_jax.nn.mixer import Mixer
from llm_jax.nn.multihead import Attention


@dataclass(frozen=True)
class MuP(Config):
    """Leaves the model of `base_width` as it is, and changes a wider one so that a step moves its activations as far.

    For Adam-like optimizers (ibid., table 8): matrices learn at the rate times base fan in / fan in, scores are divided by
    head_dim / √base_head_dim, and logits by width / base_width, where a matrix of the head's own is drawn as large as the base's.
    Matrices that give labels or a number are the same without the factor (ibid., table 3): drawn smaller by base width / width,
    which the rate is multiplied by too, so that their biases keep their own. What a head's draw adds to its output fades with the
    width: `head.gain=0` starts all widths alike (ibid., app. D.2). base_heads: heads of the base model, None for as many as the
    model has, each of them narrower. Everything else that is given as a number of channels stays what it is.
    """

    base_width: int = 64
    base_heads: int | None = None

    def validate(self):
        require_positive(self, "base_width", "base_heads")

    def base(self, model: Any) -> Any:
        """The model whose learning rate is to be the right one."""
        heads = {} if self.base_heads is None else {"attention.heads": self.base_heads}
        return override(model, {"width": self.base_width, "mup": None} | heads)

    def check(self, model: Any) -> None:
        """Raises `ConfigError` where the model has no base, or what it shares with it is not where the rules expect it."""
        require(model.width % self.base_width == 0, "mup.base_width", f"must divide width={model.width}, got {self.base_width}")
        own = any(isinstance(layer.attention, Attention) for layer in (*model.first, *model.pattern))
        require(not (own and self.base_heads), "mup.base_heads", "cannot be given where single layers have attention of their own")
        try:
            self.base(model)
        except ConfigError as error:
            raise ConfigError(f"{error.problem} (in the base model of mup.base_width={self.base_width})", error.path) from None

    def parametrized(self, model: Any) -> Any:
        """The model with its scores and logits scaled, as plain configuration."""
        base = self.base(model)
        ratio = base.width / model.width
        # a table stored divided by √width takes half of the rule: what it learns grows less with the width
        logits = math.sqrt(ratio) if model.head.tied and model.embedding.scaled else ratio

        def rescaled(mixer: Mixer | None, of: Mixer | None) -> Mixer | None:
            return _rescaled(mixer, of, model.width, base.width) if isinstance(mixer, Attention) else mixer

        def layers(name: str) -> tuple[Layer, ...]:
            pairs = zip(getattr(model, name), getattr(base, name), strict=True)
            return tuple(replace(layer, attention=rescaled(layer.attention, of.attention)) for layer, of in pairs)

        changes = {"attention": rescaled(model.attention, base.attention), "first": layers("first"), "pattern": layers("pattern")}
        if model.head.words:
            changes["head.multiplier"] = model.head.multiplier * logits
            changes["head.gain"] = model.head.gain * (1 if model.head.tied else math.sqrt(1 / ratio))
        else:
            changes["head.gain"] = model.head.gain * math.sqrt(ratio)
        return override(model, changes | {"mup": None})

    def rates(self, model: Any, vocabulary: int) -> Any:
        """For every parameter what the learning rate is multiplied by."""
        narrow, wide = (unbox(abstract_parameters(m, vocabulary)) for m in (self.base(model), model))
        table = math.sqrt(self.base_width / model.width) if model.embedding.scaled else 1.0

        def rate(path, role: str, small: jax.ShapeDtypeStruct, large: jax.ShapeDtypeStruct) -> float:
            names = [key.key for key in path]
            if role == "matrix" or (role == "head" and not model.head.words):
                return _inputs(path, small) / _inputs(path, large)
            return table if names[0] == names[-1] == "embedding" else 1.0

        return jax.tree_util.tree_map_with_path(rate, parameter_roles(wide), narrow, wide)


def _inputs(path: Any, leaf: jax.ShapeDtypeStruct) -> int:
    """Numbers that an output of the matrix is a sum over."""
    return math.prod(leaf.shape[axis] for axis in input_output_axes(path, leaf)[0])


def _rescaled(mixer: Attention, base: Attention, width: int, base_width: int) -> Attention:
    size, base_size = mixer.size(width), base.size(base_width)
    scale = mixer.scale if mixer.scale is not None else 1 / math.sqrt(size)
    return replace(mixer, scale=scale * math.sqrt(base_size / size))
