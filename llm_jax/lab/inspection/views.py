"""The views of a model: each a few pictures and tables, the numbers behind them, and a sentence on what they show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from llm_jax.core.config import ConfigError, require
from llm_jax.lab.inspection import embeddings as table_numbers
from llm_jax.lab.inspection import figures, position_figures
from llm_jax.lab.inspection.attention import attention_maps, head_numbers
from llm_jax.lab.inspection.depth import by_depth, parameter_gradients, stream_sizes
from llm_jax.lab.inspection.drawing import thinned
from llm_jax.lab.inspection.lens import logit_lens
from llm_jax.lab.inspection.positions import schemes
from llm_jax.lab.inspection.subject import Subject, embedding_table
from llm_jax.lab.inspection.view import Table, View
from llm_jax.models.model import Model

DETAILED = 6  # layers whose heads are drawn large unless more are asked for
MAPS = 16  # that are drawn small only where they are not all drawn large
WORDS = 8  # of a text, whose neighbours are listed unless others are named
LONGEST = 512  # tokens of a picture of positions


# ── while it reads ───────────────────────────────────────────────────────────────────────────────────────────────────
def attention(subject: Subject, *, layers: Sequence[int] | None = None) -> View:
    """Maps of all layers and heads small, and those of some layers large: of `layers`, or of at most six."""
    batch = subject.read
    maps = attention_maps(subject.model, subject.vocabulary, subject.params, batch)
    if not maps:
        raise ConfigError(f"mixes tokens by {_mixers(subject.model)}: there are no attention maps", subject.name)
    known = sorted({found.layer for found in maps})
    wrong = sorted(set(layers or ()) - set(known))
    require(not wrong, "layers", f"has {wrong[:1]}, but those with attention are {known[0]} … {known[-1]}")
    large = set(known if layers is None else layers)
    large = {known[i] for i in thinned(len(known), DETAILED)} if layers is None else large
    read = {"": batch.tokens, "decoder": batch.tokens, "encoder": batch.inputs}
    pieces = {name: subject.pieces(read[name]) for name in subject.model.stacks}
    drawn: dict[str, Figure] = {}
    for stack, kind in dict.fromkeys((found.stack, found.kind) for found in maps):
        group = [found for found in maps if (found.stack, found.kind) == (stack, kind)]
        title, file = _title(stack, kind), "_".join(filter(None, ("attention", stack, kind if kind == "cross" else "")))
        count = sum(found.weights.shape[1] for found in group)
        if count > MAPS or not {found.layer for found in group} <= large:
            drawn[f"{file}_overview"] = figures.overview(group, title)
        if count > 1:
            drawn[f"{file}_heads"] = figures.head_summary(group, [head_numbers(found) for found in group], title)
        for found in (found for found in group if found.layer in large):
            keys = pieces["encoder" if kind == "cross" else stack]
            several = figures.heads(found, pieces[stack], keys, f"{title}, layer {found.layer}")
            for number, figure in enumerate(several):
                drawn[f"{file}_layer_{found.layer}" + (f"_{number}" if len(several) > 1 else "")] = figure
    text = (
        "Each map has a row for every token that looks and a column for every token that is looked at; a row's weights sum to 1, "
        "less what a sink takes. Colours follow the square root of the weight, so that small weights are seen too; a long text's "
        "maps show the largest weight of each block. Entropy says how many tokens a head spreads over (2 to its power), distance "
        "how far away they are. A map says where a head reads, not what it does with it."
    )
    return View("attention", "Attention", text, maps, drawn)


def lens(subject: Subject, *, top: int = 5) -> View:
    """What the model would say after each layer, and how that approaches what it says in the end."""
    batch = subject.read
    top = min(top, subject.vocabulary)
    found = logit_lens(subject.model, subject.vocabulary, subject.params, batch, top=top)
    counts = np.ones(batch.targets.shape, bool) if batch.weights is None else np.asarray(batch.weights) > 0
    read, right = subject.pieces(batch.tokens), subject.pieces(batch.targets)
    shown = dict(zip(map(int, np.unique(found.ids)), subject.pieces(np.unique(found.ids)), strict=True))
    drawn = {
        "lens_tokens": figures.lens_table(found, shown, read, right, counts[0]),
        "lens_depths": figures.lens_curves(found, counts[0]),
        "lens_maps": figures.lens_maps(found, read, counts[0]),
    }
    said = [_listed(subject, *row) for row in zip(found.ids[-1, 0], found.probabilities[-1, 0], strict=True)]
    rows = [(str(i), read[i], right[i] if counts[0, i] else "–", said[i]) for i in thinned(len(read), 24)]
    text = (
        "The stream after each layer, read through the model's own last norm and head (nostalgebraist 2020): depth 0 is what "
        "enters the first layer, the deepest row is what the model says. A frame marks the right token: "
        f"{'the one that follows' if subject.model.causal else 'the one that stands there'}. Layers in between were not "
        "trained to be read like this, so an early row that says nothing is no sign that the layer knows nothing."
    )
    tables = (Table("What it says in the end", ("place", "reads", "right", "likeliest"), rows),)
    return View("lens", "Logit lens", text, found, drawn, tables)


def depth(subject: Subject) -> View:
    """Sizes of the stream and of gradients; only of the stream where the model scores no token ids."""
    given = (subject.model, subject.vocabulary, subject.params, subject.read)
    gradients = by_depth(*given) if subject.model.head.words else {}
    sizes = {stack: found.stream for stack, found in gradients.items()} or stream_sizes(*given)
    drawn = {"depth": figures.depth_curves(sizes, gradients)}
    text = (
        "The stream is what the layers read from and add to; depth 0 enters the first layer. Its size is the root mean square over "
        "channels. "
    )
    parts = {}
    if gradients:
        parts = parameter_gradients(*given)
        drawn["depth_parameters"] = figures.parameter_map(parts)
        text += (
            "Gradients are of this text's mean loss: at the stream, how much the loss would change with it; by parameters, "
            "the norm over all entries of each part. Curves that rise or fall by orders of magnitude mean that layers learn at "
            "very unlike speeds."
        )
    else:
        head = type(subject.model.head).__name__
        text += f"The head is {head}, which scores no token ids, so there is no loss of a text to differentiate."
    return View("depth", "Residual stream and gradients by depth", text, (sizes, gradients, parts), drawn)


# ── of the parameters alone ──────────────────────────────────────────────────────────────────────────────────────────
def embeddings(subject: Subject, *, words: Sequence[str] = (), analogies: Sequence[str] = (), count: int = 8) -> View:
    """Neighbours of some words (default: of the text), analogies "a:b:c" or, with an answer to look for, "a:b:c:d"; isotropy."""
    table_VD = embedding_table(subject.model, subject.params)
    ids = [subject.id(word) for word in words] if words else _first_words(subject)
    asked = [_analogy(subject, given) for given in analogies]
    near = table_numbers.neighbours(table_VD, ids, count=count)
    even = table_numbers.isotropy(table_VD)
    tables = []
    if ids:
        rows = [(subject.piece(word), _listed(subject, *found)) for word, *found in zip(ids, *near, strict=True)]
        tables.append(Table("Nearest by cosine", ("token", "neighbours"), rows))
    if asked:
        found = [table_numbers.analogy(table_VD, *given[:3], count=count) for given in asked]
        rows = [(_proportion(subject, given), _listed(subject, *near)) for given, near in zip(asked, found, strict=True)]
        tables.append(Table("Analogies: the largest cosine with b - a + c", ("a : b :: c : ?", "answers"), rows))
    numbers = {
        "partition ratio": even.partition,
        "average cosine": even.cosine,
        "effective rank": even.rank,
        "mean norm": even.norm,
    }
    tables.append(Table("Isotropy", tuple(numbers), [tuple(f"{value:.3g}" for value in numbers.values())]))
    drawn = {"embeddings_spectrum": figures.spectrum_curve(table_numbers.spectrum(table_VD))}
    past = _past(subject, ids, [given for given in asked if len(given) == 4])
    if past is not None:
        names = {given: _proportion(subject, given) for given in past.ranks}
        drawn["embeddings_history"] = figures.history_curves(past, names)
        steps = tuple(map(str, past.steps))
        near_then = {word: [" ".join(subject.pieces(one.ids)) for one in line] for word, line in past.neighbours.items()}
        rows = [(subject.piece(word), *line) for word, line in near_then.items()]
        tables.append(Table("Nearest at the checkpoints", ("token", *(f"step {step}" for step in steps)), rows))
    text = (
        f"Rows of the embedding table, all {len(table_VD):,} ids, those that were never seen included. Isotropic rows have a "
        "partition ratio near 1 (Mu & Viswanath 2018), an average cosine near 0 (Ethayarajh 2019) and an effective rank "
        f"(Roy & Vetterli 2007) near {min(table_VD.shape)}. The words of an analogy are never its answer, which makes it look "
        "better than it is."
    )
    return View("embeddings", "Embeddings", text, (near, even, past), drawn, tuple(tables))


def positions(subject: Subject, *, length: int | None = None) -> View:
    """What each scheme does over so many places (default: the text's, at least 64)."""
    found = schemes(subject.model, subject.params)
    if not found:
        raise ConfigError("adds nothing, turns nothing and biases nothing: there are no pictures of its positions", subject.name)
    drawn: dict[str, Figure] = {}
    for number, scheme in enumerate(found):
        read = 0 if subject.batch is None else subject.batch.tokens.shape[1]
        places = min(length or max(64, read), scheme.longest or LONGEST, LONGEST)
        file = "_".join(filter(None, ("positions", scheme.stack, scheme.name.lower(), str(number) if len(found) > 1 else "")))
        for what, figure in position_figures.pictures(scheme, places).items():
            drawn[f"{file}_{what}"] = figure
    rows = [(scheme.stack or "–", _ranges(scheme.layers), str(scheme.position)) for scheme in found]
    text = (
        "A table adds a vector to each place's token: the cosines say which places look alike. A bias is added to every attention "
        "score before the softmax; blank cells are hidden by causality. A rotation turns each pair of channels by an angle that "
        "grows with the place, so that a score depends on the distance: fast pairs tell neighbours apart, and pairs that do "
        "not turn once within the text tell far from near; the curve and the bound are of Su et al. 2021, §3.4.3."
    )
    tables = (Table("Schemes", ("stack", "layers", "scheme"), rows),)
    return View("positions", "Positions", text, found, drawn, tables)


VIEWS: dict[str, Callable[..., View]] = {
    "attention": attention,
    "lens": lens,
    "depth": depth,
    "embeddings": embeddings,
    "positions": positions,
}


# ── words ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _title(stack: str, kind: str) -> str:
    if stack != "decoder":
        return f"{stack}'s attention" if stack else "attention"
    return f"decoder's attention to {'the input' if kind == 'cross' else 'itself'}"


def _mixers(model: Model) -> str:
    return ", ".join(sorted({type(kind.attention).__name__ for stack in model.stacks.values() for kind in stack.in_full}))


def _listed(subject: Subject, ids: np.ndarray, scores: np.ndarray) -> str:
    return "   ".join(f"{subject.piece(int(i))} {score:.2f}" for i, score in zip(ids, scores, strict=True))


def _first_words(subject: Subject) -> list[int]:
    """The first tokens of the text that are more than space."""
    batch = subject.batch
    if batch is None:
        return []
    seen = dict.fromkeys(int(i) for i in np.asarray(batch.tokens if batch.inputs is None else batch.inputs)[0])
    return [i for i in seen if subject.piece(i).strip("␣↵⇥␍") and not subject.piece(i).startswith("#")][:WORDS] or list(seen)[
        :WORDS
    ]


def _analogy(subject: Subject, given: str) -> tuple[int, ...]:
    words = given.split(":")
    require(len(words) in (3, 4), "analogy", f"must be a:b:c or, with an answer to look for, a:b:c:d, got {given!r}")
    return tuple(subject.id(word) for word in words)


def _proportion(subject: Subject, given: Sequence[int]) -> str:
    a, b, c, *d = subject.pieces(given)
    return f"{a} : {b} :: {c} : {d[0] if d else '?'}"


def _past(subject: Subject, ids: Sequence[int], analogies: Sequence[Any]) -> table_numbers.History | None:
    """None where there are fewer than two checkpoints."""
    if subject.history is None:
        return None
    tables = ((step, embedding_table(subject.model, params)) for step, params in subject.history())
    found = table_numbers.history(tables, words=ids, analogies=analogies)
    return found if len(found.steps) > 1 else None


def _ranges(layers: Sequence[int]) -> str:
    """0-3, 5."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
