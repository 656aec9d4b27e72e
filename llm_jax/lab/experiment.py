"""Declaring: `Experiment` is one run, fully typed; `Ablation` is a question, its arms, and what is tuned for each."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llm_jax.core.config import (
    Config,
    ConfigError,
    check_type,
    field_types,
    nearest,
    override,
    require,
    require_positive,
    to_json,
    traced,
)
from llm_jax.core.mesh import Mesh
from llm_jax.data.labels import Labels
from llm_jax.data.pipeline import Data
from llm_jax.data.tokenizers import Bytes, Fitted, Tokenizer
from llm_jax.lab.arms import Arms, Choices, arms_of
from llm_jax.lab.components import Decoder, NextToken  # so that all choices are known
from llm_jax.models.model import Model
from llm_jax.objectives.objective import Objective
from llm_jax.optim.optimizers import AdamW, Optimizer
from llm_jax.optim.schedules import Cosine, Schedule
from llm_jax.train.pretrain import Train

LARGEST_SEED = 2**31  # seeds are traced as int32


@dataclass(frozen=True)
class Evaluation(Config):
    """What is scored, and when. every: steps; bytes: text scored a split, at most (None: all of it), whatever the tokenizer.

    lengths: multiples of the trained length that the final model is scored at, as "…@4x"; during training only 1 is.
    test: whether the final model is also scored on the test split. neighbours k: the embedding table is scored too, by
    "neighbour_purity", the share of a token's k nearest that are of its kind (`data.kinds`), and "neighbour_chance", the same of
    tokens that are shuffled. probe: what a linear probe of the final model's hidden states is to tell of each token, fitted to the
    validation split and scored on the test split, as "probe/accuracy", and "probe/chance" for always the commonest class.
    """

    every: int = 250
    bytes: int | None = 65_536
    lengths: tuple[int, ...] = (1,)
    test: bool = False
    neighbours: int | None = None
    probe: Labels | None = None

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of what is scored besides the objective's."""
        return ("neighbour_purity", "neighbour_chance") if self.neighbours else ()

    def validate(self):
        require_positive(self, "every", "bytes", "neighbours")
        require(
            all(length >= 1 for length in self.lengths),
            "lengths",
            f"must be multiples >= 1 of the trained length, got {self.lengths}",
        )


@dataclass(frozen=True)
class Checkpoints(Config):
    """every: steps between saves; keep_last, keep_every, keep_best: which of them stay on disk.

    nearby: a folder on every machine's own disk, where a second copy is written every `nearby_every` steps, for a job that is
    started again on the same machines.
    """

    every: int = 250
    keep_last: int = 1
    keep_every: int | None = None
    keep_best: bool = True
    nearby: str | None = None
    nearby_every: int = 50

    def validate(self):
        require_positive(self, "every", "keep_last", "keep_every", "nearby_every")


@dataclass(frozen=True)
class Experiment(Config):
    """One training run: everything its numbers depend on, and nothing else. Hashes to `fingerprint(experiment)`."""

    seed: int = traced(0)
    data: Data = field(default_factory=Data)
    tokenizer: Tokenizer = field(default_factory=Bytes)
    model: Model = field(default_factory=Decoder)
    objective: Objective = field(default_factory=NextToken)
    optimizer: Optimizer = field(default_factory=AdamW)
    schedule: Schedule = field(default_factory=Cosine)
    train: Train = field(default_factory=Train)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    mesh: Mesh = field(default_factory=Mesh)

    def validate(self):
        require(0 <= self.seed < LARGEST_SEED, "seed", f"must be >= 0 and < {LARGEST_SEED}, got {self.seed}")
        rows, parts = self.data.batch_size, self.train.accumulate
        require(rows % parts == 0, "train.accumulate", f"must divide data.batch_size={rows}, got {parts}")
        self.objective.check(self.model)
        every, log = self.evaluation.every, self.train.log_every
        whole = every % log == 0 or every >= self.train.steps
        require(whole, "evaluation.every", f"must be a multiple of train.log_every={log}, got {every}")

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of a row that the model says something of, and those of its encoder's input: see `Objective.lengths`."""
        data = self.data
        return self.objective.lengths(data.sequence_length, model=self.model, packed=data.packing.segmented)

    def fitted(self, cache: str | os.PathLike) -> Fitted:
        """The tokenizer, made from the corpus or read from the `cache` folder, with ids for what the objective writes itself."""
        return self.tokenizer.fit(self.data.corpus, cache).with_specials(self.objective.specials)


def sign(metric: str, *, judged: str, mode: str) -> int:
    """+1 where less of `metric` is better, -1 where more is: `mode` says so of `judged` at any length, the name of any other."""
    stem = metric.partition("@")[0]
    more = mode == "max" if stem == judged.partition("@")[0] else stem.endswith(("accuracy", "purity"))
    return -1 if more else 1


# ── the ablation ─────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Claim:
    """What people say: arm `better` beats arm `than`, by at least `by`, on `metric` (default: the ablation's)."""

    text: str
    better: str
    than: str
    metric: str | None = None
    by: float = 0.0

    @property
    def arms(self) -> tuple[str, ...]:
        """All that it is about."""
        return self.better, self.than


@dataclass(frozen=True)
class Steadier(Claim):
    """The best value of the nuisance parameter `nuisance` moves less from arm `since` to `better` than from `than_since` to `than`.

    Moves are in powers of two, either way, and each tuning seed has its own: between the lowest points of parabolas through the
    best value of the grid and its neighbours; a seed whose best is the grid's last has none. by: how much less. metric: what is
    best is judged by (default: the tuning metric).
    """

    since: str = ""
    than_since: str = ""
    nuisance: str = ""

    @property
    def arms(self) -> tuple[str, ...]:
        """The four."""
        return self.better, self.than, self.since, self.than_since


@dataclass(frozen=True)
class Ablation:
    """A question and the runs that answer it (the words are the Deep Learning Tuning Playbook's).

    scientific: the arms that are compared, `{path: {name: value}}` or `product` / `zipped` / `chain` of such.
    nuisance: `{path: values}`, the grid over which every arm is tuned on `tuning_seeds` seeds of its own; the best is then
    trained on `seeds` fresh ones, so that choosing it biases nothing. metric: what is compared; mode: whether less or more
    of it is better; tuning_metric: what the grid is judged by (default: metric). baseline: the arm that differences are
    taken from (default: the first). scales: name → overrides (of paths, or what `changed` takes).
    """

    question: str
    base: Experiment
    scientific: Choices | Arms = field(default_factory=lambda: Arms({"base": {}}))
    nuisance: Mapping[str, Sequence[float]] = field(default_factory=dict)
    seeds: int = 3
    tuning_seeds: int = 1
    metric: str = "valid/bits_per_byte"
    mode: Literal["min", "max"] = "min"
    tuning_metric: str | None = None
    baseline: str | None = None
    claims: Sequence[Claim] = ()
    scales: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    name: str = "ablation"

    def __post_init__(self):
        for name, annotation in field_types(type(self)).items():
            if name in ("question", "base", "seeds", "tuning_seeds", "metric", "mode", "tuning_metric", "baseline", "name"):
                check_type(getattr(self, name), annotation, name)
        require(self.seeds >= 1, "seeds", f"must be >= 1, got {self.seeds}")
        require(self.tuning_seeds >= 1, "tuning_seeds", f"must be >= 1, got {self.tuning_seeds}")
        for path, values in self.nuisance.items():
            where = f"nuisance[{path!r}]"
            require(isinstance(values, (tuple, list)), where, f"must be a tuple of values, got {values!r}")
            require(len(values) > 0, where, "is an empty grid: give it at least one value")
        for claim in self.claims:
            require(isinstance(claim, Claim), "claims", f"must be Claim(…)s, got {claim!r}")
            for arm in claim.arms:
                self._known(arm, f"claim {claim.text!r}")
            if isinstance(claim, Steadier) and claim.nuisance not in self.nuisance:
                tuned = ", ".join(self.nuisance) or "there is none"
                raise ConfigError(f"is about {claim.nuisance!r}, but what is tuned is: {tuned}", f"claim {claim.text!r}")
        if self.baseline is not None:
            self._known(self.baseline, "baseline")
        for arm in self.arms:
            self.experiment(arm)  # a wrong path or value is found before anything is trained

    @property
    def arms(self) -> dict[str, Mapping[str, Any]]:
        """Arm name → its changes to the base, in the order declared."""
        return dict(arms_of(self.scientific).changes)

    def _known(self, arm: str, where: str) -> None:
        if arm not in self.arms:
            raise ConfigError(f"names the arm {arm!r}, but the arms are {', '.join(self.arms)}", where)

    def experiment(self, arm: str, nuisance: Mapping[str, float] | None = None, seed: int | None = None) -> Experiment:
        """The run of one arm at one point of the grid (default: the grid's first) with one seed (default: the base's)."""
        if nuisance is None:
            nuisance = {path: values[0] for path, values in self.nuisance.items()}
        try:
            changed = override(self.base, dict(self.arms[arm]))
            return override(changed, dict(nuisance) | ({} if seed is None else {"seed": seed}))
        except ConfigError as error:
            raise ConfigError(f"{error} (in arm {arm!r})") from None

    def sign(self, metric: str) -> int:
        """+1 where less of the metric is better, -1 where more is."""
        return sign(metric, judged=self.metric, mode=self.mode)

    @property
    def grid(self) -> list[dict[str, float]]:
        """Every point of the nuisance grid."""
        return [dict(zip(self.nuisance, point, strict=True)) for point in itertools.product(*self.nuisance.values())]

    def at_scale(self, scale: str | None) -> Ablation:
        """The ablation with one of its declared scales applied; `None` leaves it as it is."""
        if scale is None:
            return self
        if scale not in self.scales:
            raise ConfigError(f"has no scale {scale!r}: it declares {', '.join(self.scales) or 'none'}", self.name)
        return self.changed(self.scales[scale])

    def changed(self, changes: Mapping[str, Any]) -> Ablation:
        """With overrides of its own "seeds", "tuning_seeds", "nuisance", of paths of the base experiment, or, as "arms", of
        paths of some of the arms: `{"arms": {"learned": {"model.position": Learned(max_length=8192)}}}`."""
        own = {k: v for k, v in changes.items() if k in ("seeds", "tuning_seeds", "nuisance")}
        arms = changes.get("arms", {})
        for arm in arms:
            self._known(arm, "scales")
        scientific = Arms({arm: {**old, **arms.get(arm, {})} for arm, old in self.arms.items()})
        base = override(self.base, {k: v for k, v in changes.items() if k not in own and k != "arms"})
        return replace(self, base=base, scientific=scientific, **own)

    def only(self, names: Sequence[str]) -> Ablation:
        """With the named arms alone; claims and a baseline that need others are dropped."""
        for name in names:
            self._known(name, "--arms")
        kept = Arms({name: changes for name, changes in self.arms.items() if name in names})
        claims = tuple(c for c in self.claims if set(c.arms) <= set(names))
        return replace(self, scientific=kept, claims=claims, baseline=self.baseline if self.baseline in names else None)

    def described(self, scale: str | None) -> dict[str, Any]:
        """The JSON that a work folder keeps and that reports are made from; scale: the name of the one it is at."""
        return {
            "scale": scale,
            "name": self.name,
            "question": self.question,
            "metric": self.metric,
            "mode": self.mode,
            "tuning_metric": self.tuning_metric or self.metric,
            "baseline": self.baseline or next(iter(self.arms)),
            "arms": list(self.arms),
            "scientific": {arm: {p: _text(v) for p, v in c.items()} for arm, c in self.arms.items()},
            "nuisance": {path: list(values) for path, values in self.nuisance.items()},
            "claims": [to_json(vars(c)) for c in self.claims],
            "seeds": self.seeds,
            "tuning_seeds": self.tuning_seeds,
        }


def _text(value: Any) -> str:
    """A component as one would type it, without the fields that are at their defaults."""
    if isinstance(value, tuple) and value and all(isinstance(one, Config) for one in value):
        return f"({', '.join(map(_text, value))},)"
    if not isinstance(value, Config):
        return str(value)
    given = [
        f"{field.name}={_text(getattr(value, field.name))}"
        for field in dataclasses.fields(value)  # type: ignore[arg-type]
        if getattr(value, field.name) != _default(field)
    ]
    return f"{type(value).__name__}({', '.join(given)})"


def _default(field: dataclasses.Field) -> Any:
    """What a field is where it is not given; `MISSING` where it must be."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _meant(error: Exception, names: Mapping[str, Any]) -> str:
    """What a misspelt field or import may have meant, to follow Python's own message."""
    field_of = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    imported = re.search(r"cannot import name '(\w+)' from '([\w.]+)'", str(error))
    if field_of and dataclasses.is_dataclass(kind := names.get(field_of[1])):
        return f": did you mean {nearest(field_of[2], [f.name for f in dataclasses.fields(kind)])}?"
    if imported and imported[2] in sys.modules:
        known = [name for name in vars(sys.modules[imported[2]]) if not name.startswith("_")]
        return f": did you mean {nearest(imported[1], known)}?"
    return ""


def load(path: str | pathlib.Path) -> Ablation:
    """The ablation that an experiment file declares as `ablation` (or a single run, as `experiment`).

    Raises `ConfigError`, with the line, if the file is missing, cannot be run, or declares neither.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ConfigError(
            "is no file: give --experiment=PATH of an experiment file, such as experiments/c06_positional_encoding.py", str(path)
        )
    spec = importlib.util.spec_from_file_location("experiment_" + re.sub(r"\W", "_", path.stem), path)
    if spec is None or spec.loader is None:
        raise ConfigError("is no Python file: give --experiment=PATH of an experiment file", str(path))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look up their annotations
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        if isinstance(error, ConfigError):
            raise ConfigError(f"{where}: {error}") from None
        said, meant = str(error), _meant(error, vars(module))
        said = said.partition(". Did you mean")[0] if meant else said  # Python guesses too, from 3.13 on
        raise ConfigError(f"cannot be run: {type(error).__name__}: {said}{meant}", where) from None
    declared = vars(module).get("ablation")
    single = vars(module).get("experiment")
    if isinstance(declared, Ablation):
        for scale in declared.scales:  # a mistake in `full` is found before the big machine is rented
            try:
                declared.at_scale(scale)
            except ConfigError as error:
                raise ConfigError(f"{path}, scale {scale!r}: {error}") from None
        return replace(declared, name=path.stem)
    if isinstance(single, Experiment):
        question = (module.__doc__ or path.stem).strip().splitlines()[0]
        scores = single.objective.scores
        score = "bits_per_byte" if "bits_per_byte" in scores else scores[0]
        return Ablation(question=question, base=single, seeds=1, metric=f"valid/{score}", name=path.stem)
    raise ConfigError("declares neither `ablation = Ablation(…)` nor `experiment = Experiment(…)`", str(path))
