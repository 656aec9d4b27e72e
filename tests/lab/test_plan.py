"""What is planned: who is tuned where, on which seeds, at what cost, and how many trials share a program."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from llm_jax.core import platform
from llm_jax.core.config import override
from llm_jax.core.types import Batch
from llm_jax.data.tokenizers import nameless
from llm_jax.lab import plan
from llm_jax.lab.components import (
    UL2,
    Attention,
    Bidirectional,
    Continuation,
    Decoder,
    EncoderDecoder,
    FillInTheMiddle,
    NextToken,
    SpanCorruption,
    Stack,
)
from llm_jax.lab.plan import Cost
from llm_jax.lab.population import compile_population
from llm_jax.models import count
from llm_jax.nn.ffn import Gated
from llm_jax.optim.optimizers import SGD
from llm_jax.train.pretrain import trial
from tests.cli.test_errors import run
from tests.lab.test_experiment import ablation
from tests.lab.test_runner import declared  # noqa: F401

EACH = Cost(parameters=10, tokens=100, flops=1e6, evaluation=0.0, memory=1e9)


@pytest.mark.parametrize(
    "memory, devices, wanted, trials",
    [
        (100e9, 1, 100, 80),
        (100e9, 1, 6, 6),
        (100e9, 3, 100, 78),
        (2e9, 4, 9, 1),
        (0.5e9, 1, 9, 1),
        (100e9, 8, 3, 3),
        (26e9, 16, 20, 16),
    ],
)
def test_as_many_trials_share_a_program_as_fit(memory, devices, wanted, trials):
    experiment = ablation().experiment("rope")
    assert plan.largest_population(experiment, EACH, memory=memory, devices=devices, wanted=wanted) == trials


@pytest.mark.parametrize(
    "shared, mesh, devices, trials",
    [
        (0.0, {}, 1, 8),
        (5e9, {}, 1, 3),  # 3 + 5 of 8, and not a sixth of 8 each
        (1e9, {}, 4, 4),  # each of the four devices has it
        (5e9, {"mesh.fsdp": 4}, 4, 3),  # a quarter each
        (9e9, {}, 1, 1),
    ],
)
def test_what_trials_share_is_counted_once_for_all_of_them(shared, mesh, devices, trials):
    experiment = override(ablation().experiment("rope"), mesh)
    each = replace(EACH, shared=shared)
    assert plan.largest_population(experiment, each, memory=10e9, devices=devices, wanted=9) == trials


def test_an_arm_whose_tuning_is_not_complete_has_no_winner_yet():
    wanted, path = ablation(tuning_seeds=2), "optimizer.learning_rate"
    tuning = [r for r in plan.tuning_runs(wanted) if r.arm == "rope" or r.nuisance[path] == 1e-3 or r.seed % 2]
    results = [{"arm": r.arm, "phase": "tune", "nuisance": r.nuisance, "metrics": {"valid/bits_per_byte": 2.0}} for r in tuning]
    assert list(plan.winners(wanted, results)) == ["rope"]


def test_the_machine_has_memory():
    assert 1e8 < platform.memory() < 1e14


def test_tuning_and_final_seeds_never_meet_and_the_worst_outcome_is_divergence():
    wanted, path = ablation(seeds=3, tuning_seeds=2), "optimizer.learning_rate"
    tuning = plan.tuning_runs(wanted)
    assert len(tuning) == 2 * 2 * 2 and len({r.name for r in tuning}) == len(tuning)
    loss = {1e-3: 2.0, 1e-2: None}
    outcomes = [
        {"arm": r.arm, "phase": "tune", "nuisance": r.nuisance, "metrics": {"valid/bits_per_byte": loss[r.nuisance[path]]}}
        for r in tuning
    ]
    best = plan.winners(wanted, outcomes)
    assert best == {"rope": {path: 1e-3}, "alibi": {path: 1e-3}}
    finals = plan.final_runs(wanted, best)
    assert len(finals) == 2 * 3 and not {r.seed for r in tuning} & {r.seed for r in finals}


def test_evaluation_costs_a_forward_pass_of_what_it_scores():
    experiment = ablation().experiment("rope")
    price = plan.cost(experiment, 257, scored=[(1000, 128), (500, 512)])
    twice = plan.cost(override(experiment, {"objective": FillInTheMiddle()}), 257, scored=[(1000, 128), (500, 512)])
    assert 2 * price.evaluation < twice.evaluation < 2.7 * price.evaluation, "left to right, and with documents moved"
    per_token = [count.flops_per_token(experiment.model, 257, length) for length in (128, 512)]
    assert price.evaluation == pytest.approx((1000 * per_token[0] + 500 * per_token[1]) / 3)
    assert price.tokens == experiment.train.steps * experiment.data.batch_size * experiment.data.sequence_length


def products(jaxpr) -> int:
    """FLOPs of the products of matrices of a traced program."""
    found = 0
    for step in jaxpr.eqns:
        times = step.params["length"] if step.primitive.name == "scan" else 1
        found += times * sum(products(inner) for inner in jaxprs_in_params(step.params))
        if step.primitive.name == "dot_general":
            (contracted, _), _ = step.params["dimension_numbers"]
            found += 2 * step.outvars[0].aval.size * math.prod(step.invars[0].aval.shape[axis] for axis in contracted)
    return found


TWO_WAYS = Attention(heads=4, mask=Bidirectional())
STACK = {"width": 64, "depth": 2, "layers": "unrolled"}
PAIR = EncoderDecoder(encoder=Stack(**STACK, attention=TWO_WAYS), decoder=Stack(**STACK, attention=Attention(heads=4)))


@pytest.mark.parametrize(
    "objective, model",
    [
        (NextToken(), Decoder(**STACK, attention=Attention(heads=4))),
        (SpanCorruption(), PAIR),
        (SpanCorruption(rate=0.5), Decoder(**STACK, attention=Attention(heads=4))),
        (UL2(), PAIR),
        (Continuation(fraction=0.25), PAIR),
        (FillInTheMiddle(), Decoder(**STACK, attention=Attention(heads=4))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_step_is_planned_to_cost_is_what_it_multiplies(objective, model):
    """Rows of 64 tokens, whatever becomes of them; the sums that are made as products with ones come on top."""
    sizes = {"data.sequence_length": 64, "data.batch_size": 4, "train.steps": 1}
    experiment = override(ablation().base, sizes | {"objective": objective, "model": model})
    tokens = nameless(512).with_specials(objective.specials)
    one = trial(experiment, tokens)
    ids = jax.ShapeDtypeStruct((1, 4, 64), np.int32)
    batch = Batch(ids, ids, jax.ShapeDtypeStruct((1, 4, 64), np.float32), ids, ids)
    traced = jax.make_jaxpr(lambda state, batch: one.steps({}, state, batch))(jax.eval_shape(one.init, {}), batch)
    assert 0.99 < products(traced.jaxpr) / plan.cost(experiment, tokens.vocabulary).flops < 1.06


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.remat": "full"},
        {"model.depth": 4, "data.sequence_length": 256},
        {"model.ffn": Gated(), "model.head.tied": False},
        {"optimizer": SGD()},
    ],
    ids=lambda c: ",".join(c) or "plain",
)
def test_memory_is_near_what_the_compiler_allots(changes):
    sizes = {"model.width": 128, "model.depth": 2, "model.attention.heads": 4, "data.sequence_length": 128, "data.batch_size": 16}
    experiment, vocabulary = override(ablation().base, sizes | changes), 512
    program = compile_population(experiment, 1, nameless(vocabulary), devices=jax.devices()[:1])
    ids = jax.ShapeDtypeStruct((1, 1, experiment.data.batch_size, experiment.data.sequence_length), np.int32)
    with jax.set_mesh(program.mesh):
        found = program.steps.lower(program.values, program.abstract, Batch(ids, ids)).compile().memory_analysis()
    allotted = found.argument_size_in_bytes + found.temp_size_in_bytes  # the state is donated
    assert 0.6 < plan.cost(experiment, vocabulary).memory / allotted < 1.7


def test_the_plan_prints_everything_and_trains_nothing(declared, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("LLM_JAX_CACHE", str(declared.parent / "cache"))
    code, shown, errors = run([f"--experiment={declared}", f"--workdir={tmp_path / 'w'}", "--plan"], monkeypatch, capsys)
    shown = " ".join(shown.split())
    assert code == 0 and not errors and not (tmp_path / "w").exists()
    assert "2 arms × 2 grid points × 1 tuning seed + 2 arms × 2 seeds = 8 runs in 4 groups" in shown, shown
    one = [f"--experiment={declared}", "--plan", "--arms=rope", "--seeds=1"]
    shown = " ".join(run(one, monkeypatch, capsys)[1].split()) + shown
    assert "1 arm × 2 grid points × 1 tuning seed + 1 arm × 1 seed = 3 runs in 2 groups" in shown, shown
    for word in ("rope", "alibi", "parameters", "tokens a run", "FLOPs a run", "memory a run", "est. time", "MiB", "2 programs"):
        assert word in shown, word
