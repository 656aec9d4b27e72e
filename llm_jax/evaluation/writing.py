"""What a model writes after each of many prompts, up to a text that ends it, the same however prompts come together."""

from __future__ import annotations

import collections
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from llm_jax.core.platform import traits
from llm_jax.evaluation.reading import Reader
from llm_jax.infer import decode
from llm_jax.infer.rows import rounded
from llm_jax.infer.sampling import Sampling
from llm_jax.infer.scoring import placing, require_finite, rows_of, shards

PLACES = 4  # in the caches of rows that are written at once, for each token of rows that are scored at once


@dataclass(frozen=True)
class Prompt:
    """context: what is gone on from; until: texts that end what is written, and are no part of it; new: tokens at most."""

    context: str
    until: tuple[str, ...]
    new: int
    sampling: Sampling


def write(reader: Reader, prompts: Sequence[Prompt], *, seed: int = 0) -> Iterator[tuple[int, str, bool]]:
    """(its number, what is written, whether its context is cut) of each prompt, those of one shape together.

    What is drawn depends on `seed`, the context, and how many of the same context came before. Raises `ConfigError`.
    """
    groups: dict[tuple, list[tuple[int, list[int], bool]]] = collections.defaultdict(list)
    for number, prompt in enumerate(prompts):
        ids, cut = reader.prompt(prompt.context, prompt.new)
        groups[rounded(len(ids)), prompt.until, prompt.new, prompt.sampling].append((number, ids, cut))
    numbers = _numbers(prompts)
    for (length, _, new, _), group in groups.items():
        size = rows_of(reader.lm.config, length + new, PLACES * traits().scored_at_once) * shards(reader.lm.params)
        for begin in range(0, len(group), size):
            part = group[begin : begin + size]
            texts = _written(reader, prompts[part[0][0]], [ids for _, ids, _ in part], [numbers[n] for n, _, _ in part], size, seed)
            for (number, _, cut), text in zip(part, texts, strict=True):
                yield number, text, cut


def until_first(text: str, until: Sequence[str]) -> str:
    """What stands before the first of these texts."""
    for end in until:
        text = text.partition(end)[0]
    return text


def _numbers(prompts: Sequence[Prompt]) -> list[int]:
    """A number for each prompt that does not depend on the others, unless they are the same."""
    seen: collections.Counter[str] = collections.Counter()
    found = []
    for prompt in prompts:
        found.append(zlib.crc32(f"{seen[prompt.context]} {prompt.context}".encode()))
        seen[prompt.context] += 1
    return found


def _written(reader: Reader, prompt: Prompt, given: list[list[int]], numbers: list[int], size: int, seed: int) -> list[str]:
    lm = reader.lm
    assert lm.tokenizer is not None
    tokenizer, before = lm.tokenizer, [() if lm.config.encodes else ids for ids in given]

    def text(row: int, ids: np.ndarray) -> str:
        return tokenizer.decode_after(before[row], ids)

    starts = [[ids[-1] if lm.start is None else lm.start] for ids in given] if lm.config.encodes else given
    with placing(lm.params) as place:
        said = decode.generate(
            lm.config,
            lm.vocabulary,
            lm.params,
            starts,
            inputs=given if lm.config.encodes else None,
            max_new_tokens=prompt.new,
            key=jax.random.key(seed),
            sampling=prompt.sampling,
            end=lm.end,
            numbers=numbers,
            width=size,
            place=place,
            halts=lambda row, ids: any(end in text(row, ids) for end in prompt.until),
        )
    require_finite(np.asarray(said.log_p)[: len(given)])
    return [until_first(text(row, ids[:n]), prompt.until) for row, (ids, n) in enumerate(zip(said.tokens, said.count, strict=True))]
