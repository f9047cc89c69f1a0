"""What the arrays of a search hold is what `estimate` says of the same plan."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from simllm.elementwise import larger, smaller
from simllm.errors import InputError
from simllm.hardware import Cluster
from simllm.models import Model
from simllm.models.context import CP_COMM_TYPES, CpCommType
from simllm.parallel.offload import Offload
from simllm.parallel.schedules import in_flight_chunks, pipeline_bubble, pipeline_time
from simllm.planner.constraints import Constraints
from simllm.planner.prices import Prices
from simllm.planner.space import Cells, Space
from simllm.planner.survey import Survey, survey
from simllm.training import Training, estimate
from simllm.training.composition import step_s
from simllm.training.exposure import exposed


def evaluated(
    model: Model, cluster: Cluster, training: Training, batch: int, constraints: Constraints, unfused: bool = False
) -> Survey:
    def prices(cells: Cells) -> dict[str, Prices]:
        return {name: Prices(model, cluster, training, cells, name) for name in constraints.precision}

    space = Space(model, cluster, training, batch, constraints, unfused)
    usable = cluster.accelerator.memory_bytes * (1 - training.memory_headroom)
    return survey(space, prices, usable, float("inf"))


def assert_equal_to_scalar(found: Survey, model: Model, training: Training, sample: int, seed: int = 0) -> None:
    numbers = random.Random(seed).sample(range(len(found)), min(sample, len(found)))
    for number in numbers:
        answer = estimate(model, found.cluster, found.plan(number), training)
        assert found.time_s[number] == pytest.approx(answer.step_time_s, rel=1e-9), answer.plan
        assert found.peak_bytes[number] == pytest.approx(answer.peak_memory_bytes, rel=1e-9), answer.plan
        assert bool(found.fits[number]) == answer.fits
        states = max(stage.state_bytes for stage in answer.stages)
        assert found.state_bytes[number] == pytest.approx(states, rel=1e-9), answer.plan


CLUSTERS = [
    ("dgx-h100", 16),
    ("dgx-a100", 64),
    ("gb200-nvl72", 72),
    ("tpu-v4-pod", 64),
    ("dgx-1v", 16),
    ("dgx-h100", 4),
]
MODELS = [
    "gpt2",
    "llama-3-8b",
    "mixtral-8x7b",
    "deepseek-v2-lite",
    "flan-t5-small",
    "bart-base",
    "jamba-v0.1",
    "glm-130b",
    "bert-base-uncased",
    "gemma-3-4b-text",
]
STACKS = ["megatron-core", "fsdp1", "megatron-deepspeed", "torchtitan", "xla"]


@settings(
    max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
@given(
    name=st.sampled_from(MODELS),
    where=st.sampled_from(CLUSTERS),
    stack=st.sampled_from(STACKS),
    batch=st.sampled_from([24, 64, 96]),
    seq_len=st.sampled_from([512, 1024, 1536]),
    optimizer=st.sampled_from(["adam", "adafactor", "adam-8bit", "muon"]),
    uneven=st.booleans(),
    kinds=st.sampled_from([(), CP_COMM_TYPES]),
    seed=st.integers(0, 2**32),
)
def test_arrays_equal_scalar_estimates(
    name: str,
    where: tuple[str, int],
    stack: str,
    batch: int,
    seq_len: int,
    optimizer: str,
    uneven: bool,
    kinds: tuple[CpCommType, ...],
    seed: int,
) -> None:
    model, cluster = Model.load(name), Cluster.load(*where)
    training = Training(seq_len=seq_len, stack=stack, optimizer=optimizer)
    precision = "fp16" if where[0] == "dgx-1v" else "bf16"
    few = Constraints(
        micro_batch_size=(1, 4),
        uneven_layers=uneven,
        precision=(precision,),
        cp=(1, 2, 4),
        cp_comm_type=kinds,
        ep=(1, 2, 4),
    )
    if "experts" not in model.parameters.by_component:
        few = few.without("ep")
    found = evaluated(model, cluster, training, batch, few, unfused=True)
    assert len(found)
    assert_equal_to_scalar(found, model, training, sample=25, seed=seed)


@pytest.mark.parametrize(
    "routing",
    [
        {"expert_imbalance": 1.4},
        {"expert_imbalance": "random", "gradient_clipping": False},
        {"expert_imbalance": 2.0, "capacity_factor": 1.25},
    ],
)
@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v2-lite"])
def test_imbalance_capacity_and_clipping_are_in_the_arrays(name: str, routing: dict[str, Any]) -> None:
    model, training = Model.load(name), Training(seq_len=1024, **routing)
    few = Constraints(micro_batch_size=(1, 4), cp=(1, 2), ep=(1, 2, 4, 8))
    found = evaluated(model, Cluster.load("dgx-h100", 16), training, 64, few)
    assert_equal_to_scalar(found, model, training, sample=40)


def test_arrays_equal_scalar_estimates_in_every_kind_of_context_parallelism() -> None:
    model, cluster = Model.load("llama-3-8b"), Cluster.load("dgx-h100", 64)
    kinds = Constraints(cp=(1, 2, 4, 16), cp_comm_type=CP_COMM_TYPES, micro_batch_size=(1,), pp=(1, 2))
    for stack in ("megatron-core", "megatron-deepspeed", "torchtitan"):
        training = Training(seq_len=32768, stack=stack)
        found = evaluated(model, cluster, training, 64, kinds)
        plans = [found.plan(number) for number in range(len(found))]
        assert {(plan.cp > 1, plan.cp_comm_type) for plan in plans} == {
            (False, "p2p"),
            *((True, kind) for kind in CP_COMM_TYPES),
        }
        # Two levels: the most ranks of a node that tensor parallelism leaves, no level of one rank.
        inner = {(plan.tp, plan.cp): plan.cp_a2a for plan in plans if plan.cp_comm_type == "a2a+p2p"}
        assert {key: n for key, n in inner.items() if key in ((1, 4), (1, 16), (4, 16))} == {
            (1, 4): 2,
            (1, 16): 8,
            (4, 16): 2,
        }
        assert_equal_to_scalar(found, model, training, sample=80)


@settings(
    max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
@given(
    name=st.sampled_from(["llama-3-8b", "gpt2", "mixtral-8x7b"]),
    tuned=st.sampled_from(
        [("lora", {"rank": 8, "targets": "all-linear"}), ("qlora", {"rank": 8, "paged": True}), ("galore", {})]
    ),
    where=st.sampled_from(CLUSTERS[:3]),
    stack=st.sampled_from(["hf-peft", "megatron-core", "torchtitan"]),
    offloads=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_arrays_equal_scalar_estimates_of_fine_tuned_models(
    name: str, tuned: tuple[str, dict[str, Any]], where: tuple[str, int], stack: str, offloads: bool, seed: int
) -> None:
    model, cluster = Model.load(name).finetuned(tuned[0], **tuned[1]), Cluster.load(*where)
    training = Training(seq_len=1024, stack=stack)
    few = Constraints(micro_batch_size=(1, 4), cp=(1, 2), ep=(1, 2) if name.startswith("mixtral") else ())
    if offloads and cluster.host is not None:
        few = replace(few, offload=(Offload(), Offload.parse("parameters,activations")))
    found = evaluated(model, cluster, training, 48 if cluster.num_gpus % 3 == 0 else 64, few)
    assert len(found)
    assert_equal_to_scalar(found, model, training, sample=25, seed=seed)


@pytest.mark.parametrize(
    ("method", "options", "seq_len"),
    [("prompt", {"virtual_tokens": 16}, 1008), ("prefix", {"virtual_tokens": 8}, 512), ("freeze", {"top": 2}, 512)],
)
def test_learned_tokens_and_frozen_stages_are_in_the_arrays(method: str, options: dict[str, int], seq_len: int) -> None:
    model, training = Model.load("llama-3-8b").finetuned(method, **options), Training(seq_len=seq_len, stack="hf-peft")
    found = evaluated(model, Cluster.load("dgx-a100", 16), training, 32, Constraints(micro_batch_size=(1, 2)))
    assert {int(found.cells.columns["tp"][cell]) for cell in found.cell} == {1, 2, 4, 8}
    assert_equal_to_scalar(found, model, training, sample=60)


def test_question_of_the_benchmark_equals_scalar_estimates() -> None:
    model, training = Model.load("llama-3.1-405b"), Training(seq_len=8192)
    found = evaluated(model, Cluster.load("dgx-h100", 16384), training, 2048, Constraints())
    assert len(found) > 50_000
    assert_equal_to_scalar(found, model, training, sample=60)


def test_several_precisions_stand_side_by_side() -> None:
    model, training = Model.load("llama-2-7b"), Training(seq_len=2048)
    few = Constraints(precision=("bf16", "fp8"), micro_batch_size=(1,), cp=(1,))
    found = evaluated(model, Cluster.load("dgx-h100", 16), training, 64, few)
    assert {s.precision for s in found.structures} == {"bf16", "fp8"}
    assert_equal_to_scalar(found, model, training, sample=40)


def test_multi_token_prediction_is_in_the_arrays() -> None:
    model, training = Model.load("deepseek-v3", mtp=True), Training(seq_len=2048)
    few = Constraints(tp=(1, 4), cp=(1,), ep=(8, 64), micro_batch_size=(1,), pp=(1, 4, 16))
    found = evaluated(model, Cluster.load("dgx-h100", 512), training, 512, few)
    assert_equal_to_scalar(found, model, training, sample=40)


@pytest.mark.parametrize(("gpus", "pp"), [(16, (1, 2)), (8, (2, 4, 8)), (64, (4,))])
def test_offload_equals_scalar_estimates(gpus: int, pp: tuple[int, ...]) -> None:
    model, training = Model.load("llama-3-8b"), Training(seq_len=4096)
    words = (
        "none",
        "optimizer",
        "optimizer:nvme,gradients",
        "activations",
        "optimizer,gradients,parameters,activations",
    )
    offload = tuple(Offload.parse(text) for text in words)
    few = Constraints(offload=offload, pp=pp, cp=(1,), micro_batch_size=(1, 4))
    cluster = Cluster.load("dgx-h100", gpus)
    found = evaluated(model, cluster, training, 64, few)
    assert {found.structures[n].offload for n in set(found.structure.tolist())} == set(offload)
    assert_equal_to_scalar(found, model, training, sample=150)


def test_hosts_that_are_too_small_are_seen() -> None:
    model, training, cluster = Model.load("llama-3.1-405b"), Training(seq_len=1024), Cluster.load("dgx-h100", 16)
    few = Constraints(offload=(Offload.parse("optimizer,gradients,parameters"),), cp=(1,), zero=("3",))
    found = evaluated(model, cluster, training, 16, few)
    assert (found.in_memory & ~found.fits).any()
    assert_equal_to_scalar(found, model, training, sample=60)
    assert found.counts()["out of memory: the hosts cannot hold what is offloaded"] > 0


def test_every_plan_of_a_survey_is_a_plan() -> None:
    model, training = Model.load("gpt2"), Training(seq_len=1024)
    found = evaluated(model, Cluster.load("dgx-h100", 8), training, 24, Constraints(uneven_layers=True))
    plans = [found.plan(number) for number in range(len(found))]
    assert len(set(plans)) == len(plans)
    assert {plan.num_gpus for plan in plans} == {8}


@given(
    st.lists(st.tuples(st.floats(0, 1e3), st.floats(0, 1e3), st.floats(0, 1)), min_size=1, max_size=5),
    st.floats(0, 1),
)
def test_formulas_take_numbers_and_arrays(rows: list[tuple[float, float, float]], share: float) -> None:
    a, b, c = (np.array(column) for column in zip(*rows, strict=True))
    assert exposed(a, b, share).tolist() == [exposed(x, y, share) for x, y, _ in rows]
    assert step_s(a, b, c).tolist() == [step_s(x, y, z) for x, y, z in rows]
    assert larger(a, b).tolist() == [max(x, y) for x, y, _ in rows]
    assert smaller(0.5, b).tolist() == [min(0.5, y) for _, y, _ in rows]
    assert pipeline_bubble(a, a + b, 2).tolist() == [pipeline_bubble(x, x + y, 2) for x, y, _ in rows]


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=8), st.integers(1, 16))
def test_pipeline_is_work_and_bubble(stages: list[float], m: int) -> None:
    assert pipeline_time(stages, m) == pytest.approx(m * max(stages) + pipeline_bubble(max(stages), sum(stages)))


def test_most_in_flight_is_that_of_the_first_rank_of_a_kind() -> None:
    # The arrays take the largest number of a kind of rank; with these schedules it is the first one's.
    for schedule, vpp in (("1f1b", 1), ("interleaved", 2), ("gpipe", 1)):
        counts = [in_flight_chunks(schedule, 8, 16, rank, vpp) for rank in range(8)]
        assert counts == sorted(counts, reverse=True)


def test_unknown_constraints_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 1f1b"):
        Constraints(schedule=("1f1",))
    with pytest.raises(InputError, match="tp=0"):
        Constraints(tp=(0,))
