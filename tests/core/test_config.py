"""Configurations: what may be written, what is refused in which words, and what survives JSON and other processes."""

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import pytest

from llm_jax.core.config import (
    Config,
    ConfigError,
    differences,
    fingerprint,
    from_json,
    override,
    require,
    require_positive,
    substitute,
    to_json,
    traced,
    traced_values,
)
from llm_jax.core.written import override_text


@dataclass(frozen=True)
class Shape(Config):
    abstract = True


@dataclass(frozen=True)
class Circle(Shape):
    radius: float = traced(1.0)

    def validate(self):
        require_positive(self, "radius")


@dataclass(frozen=True)
class Box(Shape):
    width: int = 4
    parts: int = 2
    inner: Shape = field(default_factory=Circle)

    def validate(self):
        require(self.width % self.parts == 0, "parts", f"must divide width={self.width}, got {self.parts}")


@dataclass(frozen=True)
class Top(Config):
    shape: Shape = field(default_factory=Circle)
    count: int = 3
    flag: bool = False
    limit: float | None = None
    kind: Literal["one", "two"] = "one"
    name: str = "x"
    sizes: tuple[int, ...] = (1,)
    shapes: tuple[Shape, ...] = ()


@pytest.mark.parametrize(
    "assignments, expected",
    [
        (["count=5"], Top(count=5)),
        (["limit=2"], Top(limit=2)),
        (["limit=1e-3", "limit=none"], Top()),
        (["flag=true"], Top(flag=True)),
        (["kind=two"], Top(kind="two")),
        (["name=a=b c"], Top(name="a=b c")),
        (["name=3/x"], Top(name="3/x")),
        (["name=runs"], Top(name="runs")),
        (["sizes=(1, 2, 4)"], Top(sizes=(1, 2, 4))),
        (["shape=Box"], Top(shape=Box())),
        (["shape=Box(width=6, parts=3, inner=Circle(radius=5e2))"], Top(shape=Box(width=6, parts=3, inner=Circle(500.0)))),
        (["shape=Box()", "shape.inner.radius=2"], Top(shape=Box(inner=Circle(2)))),
        (["shape=Box()", "shape.width=9", "shape.parts=3"], Top(shape=Box(width=9, parts=3))),
        (["shape.radius=2", "shape=Circle()"], Top()),
        (["shape=Circle(2)"], Top(shape=Circle(2))),
        (["shape=Box(6, parts=3)"], Top(shape=Box(6, parts=3))),
        (["shapes=(Box(6), Circle)"], Top(shapes=(Box(6), Circle()))),
        (["shapes=(Box(),) * 2 + (Circle(3),)"], Top(shapes=(Box(), Box(), Circle(3)))),
        (["shapes=()"], Top()),
    ],
)
def test_what_may_be_typed(assignments, expected):
    assert override_text(Top(), assignments) == expected


@pytest.mark.parametrize(
    "assignments, sentence",
    [
        (["cuont=5"], "cuont is no field of Top: did you mean count"),
        (["shape.radios=5"], "shape.radios is no field of Circle: did you mean radius?"),
        (["count=many"], "count must be int, got 'many'"),
        (["count=true"], "count must be int, got True"),
        (["count=1.5"], "count must be int, got 1.5"),
        (["flag=1"], "flag must be bool, got 1"),
        (["kind=three"], "kind must be 'one' | 'two', got 'three'"),
        (["sizes=(1, 'a')"], "sizes must be tuple, got (1, 'a')"),
        (["sizes=4"], "sizes must be a tuple such as (4,), got 4"),
        (["sizes=[1, 2]"], "sizes must be a tuple such as (1, 2), got [1, 2]"),
        (["shape=Circel()"], "shape has no choice 'Circel': did you mean Circle?"),
        (["shape=Circle("], "shape cannot be read: '(' was never closed: 'Circle('"),
        (["shape=Circle(2, 3)"], "shape has 1 fields in Circle, got 2 values"),
        (["shape=Circle(2, radius=3)"], "shape is given 'radius' twice in Circle"),
        (["shape=shapes.Circle(2)"], "shape takes a component by its name alone, not 'shapes.Circle(2)': did you mean Circle?"),
        (["shapes=(Circle(), Bax())"], "shapes[1] has no choice 'Bax': did you mean Box?"),
        (["shapes=Circle()"], "shapes must be"),
        (["shape=Circle(size=2)"], "shape has no 'size' in Circle: did you mean radius?"),
        (["shape.radius=-1.0"], "shape.radius must be > 0, got -1.0"),
        (["shape=Box()", "shape.inner.radius=-1"], "shape.inner.radius must be > 0, got -1"),
        (["shape=Box(parts=3)"], "parts must divide width=4, got 3"),
        (["count.more=1"], "count is 3, which has no field 'more' to set"),
        (["count"], "--set takes path=value, got 'count'"),
    ],
)
def test_what_is_refused_and_in_which_words(assignments, sentence):
    with pytest.raises(ConfigError) as error:
        override_text(Top(), assignments)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_fields_that_depend_on_each_other_change_together():
    assert override(Box(), {"width": 9, "parts": 3}) == Box(width=9, parts=3)
    with pytest.raises(ConfigError, match="parts must divide width=9, got 2"):
        override(Box(), {"width": 9})


def test_json_round_trips_and_refuses_what_it_does_not_know():
    config = Top(shape=Box(width=6, inner=Box(inner=Circle(0.5))), limit=2.5, sizes=(1, 2))
    assert from_json(to_json(config), Top) == config
    with pytest.raises(ConfigError, match="names the class 'Sphere'"):
        from_json({"class": "Top", "shape": {"class": "Sphere"}}, Top)
    with pytest.raises(ConfigError, match="has colour, unknown to Top"):
        from_json({"class": "Top", "colour": 1}, Top)


def test_fingerprints_are_stable_across_processes_and_sensitive_to_every_field():
    code = "from tests.core.test_config import *; print(fingerprint(Top(shape=Box(), sizes=(1, 2))))"
    environment = {"PYTHONHASHSEED": "3", "PYTHONPATH": ".", "JAX_PLATFORMS": "cpu"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment).stdout.strip()
    assert other == fingerprint(Top(shape=Box(), sizes=(1, 2)))
    changed = [Top(shape=Circle(2)), Top(count=4), Top(flag=True), Top(limit=1.0), Top(kind="two"), Top(name="y"), Top(sizes=())]
    assert len({fingerprint(c) for c in (Top(), *changed)}) == 8


def test_traced_values_replace_numbers_under_jit():
    assert traced_values(Top(shape=Box(inner=Circle(3.0)))) == {"shape.inner.radius": 3.0}
    area = jax.jit(lambda values: jnp.pi * substitute(Top(), values).shape.radius ** 2)
    assert abs(float(area({"shape.radius": 2.0})) - 12.566) < 1e-3
    assert Top().shape.radius == 1.0


def test_differences_name_paths():
    assert differences(Top(), Top(count=4, shape=Circle(2.0))) == {"shape.radius": (1.0, 2.0), "count": (3, 4)}
    assert differences(Top(), Top(shape=Box())) == {"shape": (Circle(), Box())}
