"""A model of ours for EleutherAI's lm-evaluation-harness, whose tasks then run over it.

    import lm_eval
    from llm_jax.evaluation.harness import HarnessLM

    lm_eval.simple_evaluate(model=HarnessLM("runs/c06"), tasks=["hellaswag"])
    lm_eval.simple_evaluate(model="llm_jax", model_args="pretrained=runs/c06,arm=rope", tasks=["hellaswag"])

The harness is the extra `harness`: this module alone imports it. What it asks is scored by `infer.scoring`, so that no score
depends on a batch size.
"""

from __future__ import annotations

import collections
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api import model as api
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from llm_jax.core.config import ConfigError
from llm_jax.data import chat
from llm_jax.evaluation.estimates import Estimate, reported
from llm_jax.evaluation.reading import Reader, reader
from llm_jax.evaluation.writing import Prompt, write
from llm_jax.infer.sampling import Greedy, Sample, Sampling
from llm_jax.infer.scoring import Request, Scorer, Scores
from llm_jax.language_model import LM, load

MAX_GEN_TOKS = 256  # the harness's own, where a task does not say how much is written
WITHOUT_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}  # what a task may say besides


@register_model("llm_jax")
class HarnessLM(api.LM):
    """What `llm_jax.load` reads, as the harness asks it.

    pretrained: a folder, or a model that is loaded; arm, trial, step: of a work folder. max_length: tokens that are read at most
    (None: `reading.longest`); what is longer is cut on the left. chats: contexts come through its chat template. seed: of what is
    drawn. The harness also gives batch_size, max_batch_size and device, which change nothing here.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike | LM,
        *,
        arm: str | None = None,
        trial: str | None = None,
        step: int | None = None,
        max_length: int | None = None,
        chats: bool = False,
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        lm = pretrained if isinstance(pretrained, LM) else load(pretrained, arm=arm, trial=trial, step=step)
        self.reader, self.seed = reader(lm, max_length, chats=chats), seed
        self.cut: dict[str | None, set] = collections.defaultdict(set)  # questions whose context is cut on the left, by task

    # ── what it is asked ─────────────────────────────────────────────────────────────────────────────────────────────
    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(Σ log p, whether it is what greedy decoding says) of each (context, continuation)."""
        pairs = []
        for request in requests:
            pair, cut = self.reader.pair(*request.args)
            pairs.append(pair)
            self.cut[request.task_name] |= {request.doc_id} if cut else set()
        answers = [(scores.log_p, scores.greedy) for scores in self._scored(pairs, disable_tqdm)]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Σ log p of each whole text, by windows."""
        rows, owners = [], []
        for number, request in enumerate(requests):
            windows = list(self.reader.windows(self.reader.encode(request.args[0])))
            rows += windows
            owners += [number] * len(windows)
        parts: list[list[float]] = [[] for _ in requests]
        for owner, scores in zip(owners, self._scored(rows, disable_tqdm), strict=True):
            parts[owner].append(scores.log_p)
        answers = [math.fsum(part) for part in parts]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What is written after each context."""
        prompts = [_prompt(*request.args[:2]) for request in requests]
        written = [""] * len(requests)
        for number, text, cut in tqdm(write(self.reader, prompts, seed=self.seed), total=len(prompts), disable=disable_tqdm):
            written[number] = text
            self.cut[requests[number].task_name] |= {requests[number].doc_id} if cut else set()
        for request, text in zip(requests, written, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return written

    def _scored(self, requests: Sequence[Request], quiet: bool) -> list[Scores]:
        lm, found = self.reader.lm, [Scores(0.0, True)] * len(requests)
        for number, scores in tqdm(Scorer(lm.config, lm.vocabulary, lm.params)(requests), total=len(requests), disable=quiet):
            found[number] = scores
        return found

    # ── chats ────────────────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def tokenizer_name(self) -> str:
        """By which the harness tells caches of requests apart."""
        lm = self.reader.lm
        assert lm.tokenizer is not None
        return re.sub(r"\W+", "_", f"llm_jax {lm.source} {lm.tokenizer.fingerprint}")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template in Jinja, None where none is wanted."""
        if not chat_template:
            return None
        return self._chats().template.source  # type: ignore[union-attr]

    def apply_chat_template(self, chat_history: chat.Messages, add_generation_prompt: bool = True) -> str:
        """The messages as the model's template writes them, up to where an answer begins, or goes on."""
        return self._chats().chat(chat_history, answering=add_generation_prompt)

    def _chats(self) -> Reader:
        if self.reader.template is None:
            self.reader = reader(self.reader.lm, self.reader.length, chats=True)
        return self.reader

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes down beside its results."""
        return {"model_source": self.reader.lm.source, "max_length": self.reader.length}


def _prompt(context: str, options: Mapping[str, Any]) -> Prompt:
    """What the harness asks to be written. Raises `ConfigError` for what is not understood."""
    given = normalize_gen_kwargs(dict(options), MAX_GEN_TOKS)
    until = handle_stop_sequences(given.pop("until", None), None)
    new = given.pop("max_gen_toks")
    return Prompt(context, tuple(filter(None, until)), new, _sampling(given))


def _sampling(given: dict[str, Any]) -> Sampling:
    draws, temperature = given.pop("do_sample", False), given.pop("temperature", 0.0)
    cuts = {name: given.pop(name) for name in ("top_k", "top_p", "min_p") if name in given}
    others = [f"{name}={value!r}" for name, value in given.items() if value != WITHOUT_EFFECT.get(name)]
    if others:
        raise ConfigError(f"asks for {', '.join(others)}, which is not known here: leave it out of generation_kwargs", "the task")
    if not draws or not temperature:
        return Greedy()
    return Sample(temperature=float(temperature), **{name: value for name, value in cuts.items() if value})


# ── from a command line ──────────────────────────────────────────────────────────────────────────────────────────────
def run(
    lm: LM,
    tasks: Sequence[str],
    manager: TaskManager,
    *,
    length: int | None = None,
    shots: int | None = None,
    chats: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> Iterator[tuple[str, dict[str, Estimate], int]]:
    """(task, the harness's scores by metric, how many contexts were cut). manager: `manager_of` them.

    Raises `ConfigError`, also for a task whose data cannot be loaded.
    """
    model = HarnessLM(lm, max_length=length, chats=chats, seed=seed)
    found = simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=shots,
        apply_chat_template=chats,
        limit=limit,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        log_samples=False,
    )
    assert found is not None
    for name, told in found["results"].items():
        yield name, dict(_estimates(name, told, found)), len(model.cut[name])


class _Manager(TaskManager):
    """What knows tasks, and says in a sentence why one cannot be loaded."""

    def load(self, spec, *more, **options):
        try:
            return super().load(spec, *more, **options)
        except ConfigError:
            raise
        except Exception as error:  # the hub's, the network's, the datasets', the task's own
            told = f"cannot be loaded: {' '.join(str(error).split())[:300]}"
            way = "mend the task, or get its data once where the hub is within reach"
            raise ConfigError(f"{told}: {way}", f"--harness_tasks={','.join(map(str, spec))}") from error


def manager_of(tasks: Sequence[str], include_path: str | None) -> TaskManager:
    """What knows the tasks: of one's own folder alone where that has all of them, since the library's thousands take seconds.

    Raises `ConfigError` for tasks that it does not have.
    """
    if include_path is not None:
        if not os.path.isdir(include_path):
            raise ConfigError(f"is no folder: {include_path!r}", "--include_path")
        own = _Manager(include_path=include_path, include_defaults=False)
        if all(own.match_tasks([name]) for name in tasks):
            return own
    manager = _Manager(include_path=include_path)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        where = f"lm_eval or {include_path}" if include_path else "lm_eval: --include_path names a folder of more"
        raise ConfigError(f"names {', '.join(unknown)}, which is no task of {where}", "--harness_tasks")
    return manager


def _estimates(name: str, told: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[tuple[str, Estimate]]:
    count = found.get("n-samples", {}).get(name, {}).get("effective", 0)
    for key, value in told.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = told.get(f"{metric}_stderr,{filtered}")
        known = isinstance(error, (int, float))
        label = metric if filtered == "none" else f"{metric} ({filtered})"
        yield label, reported(float(value), float(error) if known else math.nan, count)
