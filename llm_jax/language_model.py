"""What a user types first: a trained language model as one object.

import llm_jax

lm = llm_jax.load("runs/c06")                         # or a folder of Hugging Face
lm.generate("def main", max_new_tokens=40)            # what follows
lm.loglikelihood("2 + 2 =", [" 4", " 5"])             # ln p of each continuation
lm.logits([[1, 2, 3], [4, 5]])                        # float32 [B, L, V]
lm.embed(["one text", "another"])                     # float32 [n, D]
lm.inspect("def main").attention()                    # pictures; lens, depth, embeddings, positions
llm_jax.export(lm, "folder")                          # for transformers
"""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from llm_jax.core.config import ConfigError, check_type, override
from llm_jax.core.mesh import Mesh
from llm_jax.core.paths import to_path
from llm_jax.data.tokenizers import Fitted
from llm_jax.infer import decode, forward
from llm_jax.infer.forward import Pooling
from llm_jax.infer.rows import Ids, Rows, alike, batches, owned, pad, rounded, rounded_count
from llm_jax.infer.sampling import Greedy, Sampling
from llm_jax.io import huggingface, pretrained, tokenizer_json
from llm_jax.io.huggingface import Dtype
from llm_jax.models.model import Model, Params
from llm_jax.nn.linear import Precision

if TYPE_CHECKING:
    from llm_jax.lab.inspection import Inspection
    from llm_jax.lab.trained import Trained

Text = str | Ids
Texts = Text | Sequence[Text]


@dataclass(frozen=True, repr=False)
class LM:
    """A language model with its parameters and its tokenizer.

    Wherever it takes texts it also takes token ids, one or several. Programs are compiled on first use, one for each of a few
    lengths that rows are padded to, and kept as long as the process lives; batch_size: rows that go through the network at once.

    config: the architecture. vocabulary: number of token ids. before, after: ids that the tokenizer puts around a text. end: ids
    that end a text. start: what stands before the first token. source: where it comes from; folder: whose files are exported with
    it; family: what Hugging Face calls the architecture; untold: why it has no tokenizer, where there are files of one; trial: what
    it was trained as here.
    """

    config: Model
    vocabulary: int
    params: Params
    tokenizer: Fitted | None = None
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    start: int | None = None
    source: str = ""
    folder: pathlib.Path | None = None
    family: str | None = None
    untold: str = ""
    trial: Trained | None = None

    def __repr__(self) -> str:
        stacks = " + ".join(f"{stack.depth} layers" for stack in self.config.stacks.values())
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        tokenizer = type(self.tokenizer).__name__.lstrip("_") if self.tokenizer else "no tokenizer"
        kind = f"{type(self.config).__name__}, {stacks} × {self.config.final.width}"
        return f"LM({kind}, {count:,} parameters, {self.vocabulary:,} tokens ({tokenizer}), from {self.source or 'memory'})"

    # ── what it says ─────────────────────────────────────────────────────────────────────────────────────────────────
    def logits(self, tokens: Texts, targets: Texts | None = None, *, types: Any = None, batch_size: int = 8) -> np.ndarray:
        """What the head says of each place: float32 `[B, L, V]` of a language model, about the token that follows.

        tokens: rows of any lengths; L is the longest, and what lies behind a row's own end is 0. targets: what the decoder of an
        encoder-decoder reads, beginning with a start token. types: kinds of tokens, rows like `tokens` (BERT's segments). A
        classifier says `[B, L, labels]` or `[B, labels]`.
        """
        rows, _ = self._rows(tokens)
        kinds = None if types is None else self._kinds(types, rows)
        inputs = None
        if targets is not None and not self.config.encodes:
            raise ConfigError("are what an encoder-decoder reads, and this model has one stack: leave them out", "targets")
        if self.config.encodes:
            if targets is None:
                raise ConfigError("is missing: what an encoder-decoder's logits are of, beginning with a start token", "targets")
            rows, inputs = self._rows(targets, whole=False)[0], rows
            if len(rows) != len(inputs):
                raise ConfigError(f"has {len(rows)} rows, but tokens has {len(inputs)}", "targets")
        length = max(map(len, rows))
        said: list[Any] = [None] * len(rows)
        for group, given, read in self._batches(rows, inputs, batch_size):
            more = None if kinds is None else pad([kinds[i] for i in group], given.tokens.shape[1], len(given.tokens)).tokens
            found = np.asarray(forward.logits(self.config, self.vocabulary, self.params, given, read, more))
            for place, row in enumerate(group):
                said[row] = _fit(found[place], length, rows[row]) if forward.by_token(self.config) else found[place]
        return np.stack(said)

    def loglikelihood(self, context: Texts, continuation: Texts, *, batch_size: int = 8) -> Any:
        """Σ ln p of the continuation's tokens after the context, in nats: a number, or `[n]` float32 for lists.

        One context or one continuation goes with all of several others. Two texts are tokenized together, as they would be read,
        and what is scored begins with the first token that the continuation has a part in. An encoder reads the context.
        """
        decode.check(self.config, decode.SCORES_NONE)
        (befores, alone), (afters, single) = _several(context), _several(continuation)
        if not befores or not afters:
            raise ConfigError("has nothing in it: give at least one text", "continuation" if befores else "context")
        befores, afters = befores * (len(afters) if alone else 1), afters * (len(befores) if single else 1)
        if len(befores) != len(afters):
            raise ConfigError(f"has {len(afters)} texts, but context has {len(befores)}", "continuation")
        rows, inputs, first = [], [], []
        for pair in zip(befores, afters, strict=True):
            row, begin, read = self._scored(*pair)
            rows.append(row)
            first.append(begin)
            inputs.append(read)
        found = np.zeros(len(rows), np.float32)
        for group, given, read in self._batches([row[:-1] for row in rows], inputs if self.config.encodes else None, batch_size):
            follows = pad([rows[i][1:] for i in group], given.tokens.shape[1], len(given.tokens)).tokens
            begins = np.array([first[i] for i in group] + [1] * (len(given.tokens) - len(group)), np.int32)
            score = forward.score(self.config, self.vocabulary, self.params, given, follows, begins, read)
            found[group] = np.asarray(score.log_p)[: len(group)]
        return float(found[0]) if alone and single else found

    def embed(self, texts: Texts, *, pooling: Pooling = "mean", batch_size: int = 8) -> np.ndarray:
        """A vector a text, `[n, D]` float32: the final hidden states, or an encoder-decoder's encoder's, pooled over the tokens."""
        check_type(pooling, Pooling, "pooling")
        rows, _ = self._rows(texts)
        found = np.zeros((len(rows), self.config.final.width), np.float32)
        for group, given, _ in self._batches(rows, None, batch_size, stack=0):
            vectors = forward.embed(self.config, self.vocabulary, self.params, given, pooling=pooling)
            found[group] = np.asarray(vectors)[: len(group)]
        return found

    def inspect(self, text: Text | None = None, *, input: Text | None = None) -> Inspection:
        """A look inside while it reads a text, or, without one, at what does not need any: embeddings and positions.

        input: what an encoder-decoder's encoder reads; the text is then what its decoder writes.
        """
        from llm_jax.lab import inspection, trained  # take seconds to import

        if input is not None and not self.config.encodes:
            raise ConfigError("is for an encoder-decoder: give this model all that it reads as its text", "input")
        batch = None
        if text is not None:
            row = self._ids(text) if self.config.encodes else self._rows([text])[0][0]
            read = None if input is None else self._rows([input])[0][0]
            first, *_ = self.config.stacks.values()
            forward.check_length(self.config.final, len(row), "the text")
            forward.check_length(first, len(read or ()), "the input")
            start = self._start(read) if self.config.encodes and read else 0
            batch = inspection.sequence(self.config, row, inputs=read, start=start)
        history = None if self.trial is None else partial(trained.history, self.trial)
        subject = inspection.Subject(self.source, self.config, self.vocabulary, self.params, self.tokenizer, batch, history)
        return inspection.Inspection(subject)

    def generate(
        self,
        prompts: Texts,
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        seed: int = 0,
        end: Sequence[int] | None = None,
        batch_size: int = 8,
    ) -> Any:
        """What follows each prompt, without the prompt: texts for texts, and ids, the end token included, for ids.

        sampling: `Greedy()`, the most probable token, unless given; `Sample(temperature=0.8, top_p=0.95)` draws, the same for the
        same `seed` and place in the list. end: ids that end a text, of which the model has its own. An encoder reads the prompt.
        Experts with a capacity take every token that chose them, other than in `logits`: what is full depends on what is computed
        together.
        """
        check_type(seed, int, "seed")
        check_type(max_new_tokens, int, "max_new_tokens")
        check_type(sampling, Sampling | None, "sampling")
        if end is not None and not isinstance(end, (Sequence, np.ndarray)):
            raise ConfigError(f"must be a list of token ids, got {end!r}", "end")
        rows, single = self._rows(prompts)
        texts = [isinstance(prompt, str) for prompt in _several(prompts)[0]]
        key, found = jax.random.key(seed), [np.zeros(0, np.int32)] * len(rows)
        call = partial(
            decode.generate,
            self.config,
            self.vocabulary,
            self.params,
            max_new_tokens=max_new_tokens,
            sampling=sampling or Greedy(),
            end=self.end if end is None else end,
        )
        for group in batches([(len(row),) for row in rows], batch_size):
            given = [rows[i] for i in group]
            begins, inputs = ([[self._start(row)] for row in given], given) if self.config.encodes else (given, None)
            said = call(begins, inputs=inputs, key=key, numbers=group)
            for row, ids, count in zip(group, said.tokens, said.count, strict=True):
                found[row] = ids[:count]
        said = [self._text(r, ids) if is_text else ids.tolist() for r, ids, is_text in zip(rows, found, texts, strict=True)]
        return said[0] if single else said

    # ── from texts to rows and back ──────────────────────────────────────────────────────────────────────────────────
    def _rows(self, texts: Texts, *, whole: bool = True) -> tuple[list[Ids], bool]:
        """Token ids of each text, and whether it was one alone. whole: with what the tokenizer puts around a text."""
        several, single = _several(texts)
        rows = [self._ids(text, *((self.before, self._after) if whole else ((), ()))) for text in several]
        if not rows or min(map(len, rows)) == 0:
            raise ConfigError("has nothing in it: give at least one token", "a text" if rows else "the list of texts")
        return rows, single

    def _kinds(self, types: Any, rows: Sequence[Ids]) -> list[Ids]:
        """A kind for each token of each row. Raises `ConfigError` unless they are so many and the model has them."""
        count = 0 if self.config.encodes else self.config.embedding.types  # type: ignore[attr-defined]
        if not count:
            raise ConfigError("are kinds of tokens, and this model has none: leave them out", "types")
        kinds = _several(types)[0]
        if list(map(len, kinds)) != list(map(len, rows)):
            raise ConfigError(
                f"has rows of {list(map(len, kinds))} kinds, but tokens has rows of {list(map(len, rows))} tokens", "types"
            )
        wrong = next((int(kind) for row in kinds for kind in row if not 0 <= kind < count), None)
        if wrong is not None:
            raise ConfigError(f"has {wrong}, but there are only 0 … {count - 1}", "types")
        return kinds

    @property
    def _after(self) -> tuple[int, ...]:
        """What the tokenizer puts after a text, unless the model is to go on from there."""
        return () if self.config.causal and not self.config.encodes else self.after

    def _ids(self, text: Text, before: Sequence[int] = (), after: Sequence[int] = ()) -> list[int]:
        if not isinstance(text, str):
            text = np.asarray(text).tolist() if isinstance(text, jax.Array) else text
            other = next((i for i in text if not isinstance(i, (int, np.integer))), None)
            if other is not None:
                raise ConfigError(
                    f"must be a whole number, got {other!r}: ids and texts go one a row, as [[1, 2], [3]]", "a token id"
                )
            ids = [int(i) for i in text]
            wrong = next((i for i in ids if not 0 <= i < self.vocabulary), None)
            if wrong is not None:
                raise ConfigError(f"is {wrong}, but there are only 0 … {self.vocabulary - 1}", "a token id")
            return ids
        if self.tokenizer is None:
            why = self.untold or f"{self.source} has no tokenizer"
            raise ConfigError(f"are what this model takes, got {text[:40]!r}: {why}", "token ids")
        return owned([*before, *map(int, self.tokenizer.encode(text)), *after], self.vocabulary, self.source)

    def _scored(self, context: Text, continuation: Text) -> tuple[list[int], int, list[int]]:
        """A row, the place of its first token that is scored, and what an encoder reads.

        Two texts are read as the one that they are together, whatever their tokens; `evaluation.reading`, whose scores are to
        compare with lm-evaluation-harness's, keeps the context's own tokens instead, as that does.
        """
        if self.config.encodes:
            read = self._ids(context, self.before, self.after)
            return [self._start(read), *self._ids(continuation)], 1, read
        if isinstance(context, str) and isinstance(continuation, str):
            known, row = self._ids(context, self.before), self._ids(context + continuation, self.before)
            first = alike(known, row)
        else:
            known = self._ids(context, self.before)
            row, first = [*known, *self._ids(continuation)], len(known)
        return (row, first, []) if first else ([self._start(()), *row], 1, [])

    def _start(self, read: Sequence[int]) -> int:
        """What stands before the first token: the model's own start token, or the last that its encoder reads."""
        if self.start is None and not len(read):
            raise ConfigError("is empty, and this model has no start token: give at least one token", "context")
        return read[-1] if self.start is None else self.start

    def _text(self, prompt: Ids, ids: np.ndarray) -> str:
        assert self.tokenizer is not None
        return self.tokenizer.decode_after(() if self.config.encodes else prompt, ids)

    def _batches(
        self, rows: Sequence[Ids], inputs: Sequence[Ids] | None, size: int, *, stack: int = -1
    ) -> Iterator[tuple[list[int], Rows, Rows | None]]:
        """Indices of rows, the rows padded, and what an encoder reads for them. stack: which of the model's reads the rows."""
        stacks = list(self.config.stacks.values())
        size = 1 if forward.alone(self.config) else size

        def padded(group: list[int], of: Sequence[Ids], reader: Any) -> Rows:
            longest = max(len(of[i]) for i in group)
            forward.check_length(reader, longest, "a row")
            return pad([of[i] for i in group], rounded(longest, forward.longest(reader)), rounded_count(len(group)))

        lengths = [(len(row), len(inputs[i]) if inputs else 0) for i, row in enumerate(rows)]
        for group in batches(lengths, size):
            yield group, padded(group, rows, stacks[stack]), padded(group, inputs, stacks[0]) if inputs else None


def _several(texts: Any) -> tuple[list[Any], bool]:
    """The texts as a list, and whether it was one alone: a string, or ids."""
    if not isinstance(texts, (str, Sequence, np.ndarray, jax.Array)):
        raise ConfigError(f"must be a string, token ids, or a list of such, got {texts!r}", "a text")
    single = isinstance(texts, str) or (len(texts) > 0 and np.ndim(texts[0]) == 0 and not isinstance(texts[0], str))
    return ([texts] if single else list(texts)), single


def _fit(said: np.ndarray, length: int, row: Ids) -> np.ndarray:
    """`[length, …]` of a row that was padded to another."""
    kept = said[: len(row)]
    return np.concatenate([kept, np.zeros((length - len(row), *said.shape[1:]), np.float32)])


# ── reading and writing ──────────────────────────────────────────────────────────────────────────────────────────────
def load(
    path: str | os.PathLike,
    *,
    arm: str | None = None,
    trial: str | None = None,
    step: int | None = None,
    dtype: Dtype = "float32",
    compute: Literal["float32", "bfloat16"] | None = None,
    mesh: Mesh | None = None,
) -> LM:
    """The model in a folder: one that Hugging Face's `save_pretrained` wrote, or one that `python -m llm_jax run` trained into.

    arm, trial: which of the trials of a work folder, by the arm's name or the trial's; otherwise the best final one of all. step:
    which of its checkpoints, otherwise the last. Its parameters are those that its evaluation saw. dtype: of the parameters of
    Hugging Face. compute: dtype of the activations; None is float32, or what a trial was trained in. mesh: whose devices the
    parameters are split over, `Mesh(data=1, fsdp=-1)` over all; None: all on one. Raises `ConfigError`, in a sentence.
    """
    given = {"path": (path, str | os.PathLike), "arm": (arm, str | None), "trial": (trial, str | None), "step": (step, int | None)}
    for name, (value, kind) in (given | {"dtype": (dtype, Dtype), "mesh": (mesh, Mesh | None)}).items():
        check_type(value, kind, name)
    folder = to_path(path)
    if pretrained.is_here(folder):
        if (arm, trial, step) != (None, None, None):
            raise ConfigError("is a model of Hugging Face, which has no arms, trials and steps", str(path))
        found = pretrained.load(folder, dtype=dtype, mesh=mesh)
        names = ("tokenizer", "before", "after", "end", "start", "family", "untold")
        more = {name: getattr(found, name) for name in names}
        return LM(_computing(found.model, compute), found.vocabulary, found.params, source=str(path), folder=folder, **more)
    from llm_jax.lab import trained  # takes a second to import

    if not trained.is_here(folder):
        wanted = "a folder with a config.json of transformers, or one that `python -m llm_jax run --workdir=` made"
        raise ConfigError(f"is no model: give {wanted}", str(path))
    if dtype != "float32":
        raise ConfigError(f"is {dtype}, and what was trained here is float32: take compute={dtype!r} for its activations", "dtype")
    own = trained.load(folder, arm=arm, trial=trial, step=step, mesh=None if mesh is None else mesh.build())
    end = own.tokenizer.end
    # documents follow one another, each after the end of the one before, as the harness has it (where they were masked from each
    # other, what follows an end was not learned); an encoder's last token is where its decoder begins
    start = None if own.model.encodes else end
    source = f"{own.result['trial']} at step {own.step}"
    model, vocabulary, ends = _computing(own.model, compute), own.tokenizer.vocabulary, () if end is None else (end,)
    return LM(model, vocabulary, own.params, own.tokenizer, end=ends, start=start, source=source, trial=own)


def _computing(model: Model, compute: Literal["float32", "bfloat16"] | None) -> Model:
    """The model with its activations in that dtype."""
    if compute is None:
        return model
    return override(model, {f"{path}.precision" if path else "precision": Precision(compute=compute) for path in model.stacks})


def export(
    lm: LM,
    path: str | os.PathLike,
    format: Literal["huggingface"] = "huggingface",
    *,
    family: str | None = None,
    dtype: Dtype = "float32",
) -> None:
    """Writes a new folder that transformers loads: config.json, safetensors, and the tokenizer where its formats can say it.

    family: a `model_type` of Hugging Face; otherwise the one it came from, or the first that computes the same, if need be with
    factors folded into matrices, absent biases as zeros, and keys repeated. Raises `ConfigError`, with the nearest, if none does.
    """
    if not isinstance(lm, LM):
        raise ConfigError(f"must be what llm_jax.load gave, got {lm!r}: export(lm, path)", "lm")
    if format != "huggingface":
        raise ConfigError(f"must be 'huggingface', got {format!r}", "format")
    write = partial(huggingface.export, lm.config, lm.vocabulary, lm.params, path, family=family or lm.family, dtype=dtype)
    if lm.folder is not None:
        write(tokenizer_files=huggingface.tokenizer_files(lm.folder), settings=huggingface.settings(lm.folder))
        return
    ends = {"eos_token_id": lm.end[0] if lm.end else None, "bos_token_id": lm.start}
    with tempfile.TemporaryDirectory() as scratch:
        files = tokenizer_json.write(lm.tokenizer, pathlib.Path(scratch)) if lm.tokenizer else []
        write(tokenizer_files=files, settings={name: value for name, value in ends.items() if value is not None})
