"""Estimates: conservation, monotonicity, and figures that can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simllm.errors import InputError
from simllm.hardware import Cluster
from simllm.models import Model
from simllm.models.activations import Recompute
from simllm.models.graph import Layout
from simllm.models.spec import ModelSpec
from simllm.parallel import Plan
from simllm.training import Estimate, Training, estimate
from simllm.training.exposure import launch_s
from tests.strategies import specs

LLAMA = Model.load("llama-3-70b")
TRAINING = Training(seq_len=8192)
BASE: dict[str, Any] = {"tp": 8, "pp": 4, "dp": 16, "global_batch_size": 1024, "sequence_parallel": True}


def run(plan: Plan, cluster: str = "dgx-h100", training: Training = TRAINING, model: Model = LLAMA) -> Estimate:
    return estimate(model, Cluster.load(cluster, plan.num_gpus), plan, training)


PLANS = [
    {},
    {"micro_batch_size": 2, "recompute": Recompute(kind="full")},
    {"pp": 8, "vpp": 2, "schedule": "interleaved", "dp": 8},
    {"pp": 4, "schedule": "gpipe"},
    {"pp": 1, "dp": 64, "zero": "3"},
    {"pp": 1, "dp": 64, "zero": "hsdp"},
    {"pp": 1, "dp": 64, "zero": "2"},
    {"zero": "0"},
    {"tp": 4, "cp": 2, "recompute": Recompute.parse("every:2")},
    {"precision": "fp8"},
    {"recompute": Recompute.parse("list:act")},
]


@pytest.mark.parametrize("changes", PLANS, ids=str)
@pytest.mark.parametrize("stack", ["megatron-core", "megatron-lm", "torchtitan", "fsdp1"])
def test_parts_add_up(changes: dict[str, Any], stack: str) -> None:
    answer = run(Plan(**(BASE | changes)), training=Training(seq_len=8192, stack=stack))
    assert sum(answer.time.by_cause.values()) == pytest.approx(answer.step_time_s, rel=1e-12)
    assert all(seconds >= 0 for seconds in answer.time.by_cause.values())
    for stage in answer.stages:
        assert sum(stage.by_kind.values()) == pytest.approx(stage.peak_bytes, rel=1e-12)
        assert all(size >= 0 for size in stage.by_kind.values())
    assert answer.peak_memory_bytes == max(stage.peak_bytes for stage in answer.stages)
    low, high = answer.step_time_interval_s
    assert low <= answer.step_time_s <= high
    by_convention = answer.to_dict()["mfu_by_convention"]
    assert 0 < by_convention["masked"] <= by_convention["full-attention"] == answer.mfu <= answer.hfu < 1


def test_json_has_the_promised_keys() -> None:
    document = run(Plan(**BASE)).to_dict()
    scalars = {"step_time_s", "step_time_interval_s", "tokens_per_s_per_gpu", "model_tflops_per_gpu", "mfu", "hfu"}
    assert scalars | {"fits", "memory", "time", "communication", "assumptions"} <= document.keys()
    assert {"peak_bytes", "by_kind", "per_stage"} <= document["memory"].keys()
    assert "by_cause" in document["time"]
    assert len(document["memory"]["per_stage"]) == 4


def test_model_flops_by_hand() -> None:
    # 6 (N - token table) tokens + 12 L h s tokens over full attention, N - token table = 69.5 B less the norms.
    answer = run(Plan(**BASE))
    matmul = LLAMA.parameters.total - LLAMA.parameters.embedding - LLAMA.parameters.by_component["norm"]
    tokens = 1024 * 8192
    flops = 6 * matmul * tokens + 12 * 80 * 8192 * 8192 * tokens
    assert answer.model_tflops_per_gpu == pytest.approx(flops / answer.step_time_s / 512 / 1e12, rel=1e-12)
    assert answer.mfu == pytest.approx(answer.model_tflops_per_gpu / 989.4, rel=1e-12)
    assert answer.tokens_per_s_per_gpu == pytest.approx(tokens / answer.step_time_s / 512)
    assert answer.training_time_s(15e12) == pytest.approx(15e12 / tokens * answer.step_time_s)


def test_full_recomputation_repeats_the_layers_forward() -> None:
    answer = run(Plan(**(BASE | {"recompute": Recompute(kind="full")})))
    flops = LLAMA.flops(8192)
    layers = flops.forward_full_attention - 2 * 8192 * 8192 * 128256
    assert answer.hfu / answer.mfu == pytest.approx(1 + layers / flops.training_full_attention, rel=1e-9)


STATES = [
    # arXiv:1910.02054, section 3 with Megatron-LM's float32 gradients: 2 + 4 + 12 bytes.
    ("megatron-core", "0", lambda n, d: 18 * n),
    ("megatron-core", "1", lambda n, d: 6 * n + 12 * n / d),
    ("megatron-core", "2", lambda n, d: 2 * n + 16 * n / d),
    ("megatron-core", "3", lambda n, d: 18 * n / d),
    ("torchtitan", "3", lambda n, d: 16 * n / d),
    ("torchtitan", "hsdp", lambda n, d: 16 * n / 8),
]


@pytest.mark.parametrize(("stack", "zero", "formula"), STATES)
def test_states_by_zero_stage(stack: str, zero: str, formula: Any) -> None:
    model = Model.load("olmo-7b")  # its vocabulary is a multiple of 128, so nothing is padded
    plan = Plan(dp=64, zero=zero, global_batch_size=64)  # type: ignore[arg-type]
    answer = run(plan, training=Training(seq_len=2048, stack=stack), model=model)
    kinds = answer.stages[0].by_kind
    states = kinds["parameters"] + kinds["gradients"] + kinds["optimizer"]
    assert states == pytest.approx(formula(model.parameters.total, 64), rel=1e-9)


@pytest.mark.parametrize("stack", ["megatron-core", "fsdp1", "megatron-deepspeed"])
def test_more_sharding_never_stores_more(stack: str) -> None:
    training = Training(seq_len=2048, stack=stack)
    model = Model.load("llama-2-7b")
    states = {}
    for zero in ("0", "1", "2", "3", "hsdp"):
        plan = Plan(dp=64, zero=zero, global_batch_size=64)  # type: ignore[arg-type]
        kinds = run(plan, training=training, model=model).stages[0].by_kind
        states[zero] = kinds["parameters"] + kinds["gradients"] + kinds["optimizer"]
    assert states["0"] >= states["1"] >= states["2"] >= states["3"]
    # Inside groups of eight: less than nothing sharded, more than over all 64.
    assert states["0"] > states["hsdp"] == pytest.approx(8 * states["3"])


@settings(deadline=None)
@given(specs(), st.sampled_from(["megatron-core", "megatron-lm", "torchtitan-eager"]), st.sampled_from([1, 2]))
def test_more_recomputation_never_stores_more_nor_runs_faster(spec: ModelSpec, stack: str, pp: int) -> None:
    model = Model(spec)
    layers = spec.num_hidden_layers
    if layers % pp:
        pp = 1
    training = Training(seq_len=256, stack=stack)
    answers = [
        run(
            Plan(pp=pp, dp=8 // pp, global_batch_size=32, recompute=Recompute.parse(policy)),
            "dgx-a100",
            training,
            model,
        )
        for policy in ("none", "selective", "every:2", "full")
    ]
    for stages in zip(*(answer.stages for answer in answers), strict=True):
        kept = [stage.by_kind["activations"] for stage in stages]
        # "selective" and "every:2" are not comparable with each other.
        assert kept[3] <= min(kept[1:3]) <= max(kept[1:3]) <= kept[0]
    times = [answer.step_time_s for answer in answers]
    assert times[0] <= min(times[1:3]) * (1 + 1e-12) <= max(times[1:3]) * (1 + 2e-12) <= times[3] * (1 + 3e-12)


@settings(deadline=None)
@given(
    st.sampled_from(["scaleup_bandwidth", "scaleout_bandwidth_per_node", "memory_bandwidth", "peak"]),
    st.floats(1.0, 16.0),
    st.sampled_from(PLANS[:-1]),
)
def test_faster_hardware_is_never_slower(what: str, factor: float, changes: dict[str, Any]) -> None:
    plan = Plan(**(BASE | changes))
    cluster = Cluster.load("dgx-h100", plan.num_gpus)
    card = cluster.accelerator
    if what == "memory_bandwidth":
        better = replace(cluster, accelerator=replace(card, memory_bandwidth=card.memory_bandwidth * factor))
    elif what == "peak":
        peaks = {precision: rate * factor for precision, rate in card.peak_flops.items()}
        better = replace(cluster, accelerator=replace(card, peak_flops=peaks, notes=f"x{factor}"))
    else:
        better = replace(cluster, **{what: getattr(cluster, what) * factor})
    now, then = (estimate(LLAMA, c, plan, TRAINING).step_time_s for c in (cluster, better))
    assert then <= now * (1 + 1e-9)


def test_more_tokens_take_longer_and_more_memory() -> None:
    times, peaks = [], []
    for seq_len in (2048, 4096, 8192, 16384):
        answer = run(Plan(**BASE), training=Training(seq_len=seq_len))
        times.append(answer.step_time_s)
        peaks.append(answer.peak_memory_bytes)
    assert times == sorted(times)
    assert peaks == sorted(peaks)


def test_tapered_network_is_not_faster() -> None:
    plan = Plan(tp=8, pp=1, dp=512, global_batch_size=1024, sequence_parallel=True, zero="3")
    flat = run(plan, "dgx-h100")
    tapered = run(plan, "meta-grand-teton")
    assert tapered.step_time_s >= flat.step_time_s * (1 - 1e-9)


def test_experts_are_sharded_over_their_own_ranks() -> None:
    mixtral = Model.load("mixtral-8x7b")
    training = Training(seq_len=4096)
    one = run(Plan(dp=64, global_batch_size=64, zero="0"), training=training, model=mixtral)
    eight = run(Plan(dp=64, ep=8, global_batch_size=64, zero="0"), training=training, model=mixtral)
    experts = mixtral.parameters.by_component["experts"]
    difference = one.stages[0].by_kind["parameters"] - eight.stages[0].by_kind["parameters"]
    assert difference == 2 * experts * 7 / 8
    assert eight.time.by_cause["expert_parallel"] > 0 == one.time.by_cause["expert_parallel"]


def test_interleaving_shrinks_the_bubble() -> None:
    plain = run(Plan(**(BASE | {"pp": 8, "dp": 8})))
    two = run(Plan(**(BASE | {"pp": 8, "dp": 8, "vpp": 2, "schedule": "interleaved"})))
    assert two.time.by_cause["pipeline_bubble"] == pytest.approx(plain.time.by_cause["pipeline_bubble"] / 2, rel=0.05)
    assert two.stages[0].by_kind["activations"] > plain.stages[0].by_kind["activations"]


def test_traffic_of_a_step_by_hand() -> None:
    answer = run(Plan(**BASE))
    by_group = {(traffic.group, traffic.operation): traffic for traffic in answer.communication}
    m, layers, size = 64, 20, 8192 * 8192 * 2
    gather = by_group["tp", "all_gather"]
    # Six gathers a layer; the busiest stage is the last, with the head's two.
    assert answer.time.busiest_stage == 3
    assert gather.calls == m * (6 * layers + 2)
    assert gather.size_bytes == gather.calls * size
    assert by_group["pp", "send_recv"].size_bytes == m * size / 8
    assert by_group["dp", "reduce_scatter"].ranks == 16
    assert by_group["dp", "reduce_scatter"].bottleneck == "infiniband"
    assert by_group["tp", "all_gather"].bottleneck == "nvlink4"


def test_degrees_must_multiply_to_the_gpus() -> None:
    with pytest.raises(InputError, match="= 512 GPUs, but the cluster has 64; the degrees must multiply to it"):
        estimate(LLAMA, Cluster.load("dgx-h100", 64), Plan(**BASE), TRAINING)


WRONG_RUNS: list[tuple[dict[str, Any], str]] = [
    ({"seq_len": 0}, "seq_len=0"),
    ({"seq_len": -1}, "seq_len=-1"),
    ({"seq_len": 2**40}, "seq_len="),
    ({"seq_len": 1.5}, "seq_len=1.5"),
    ({"seq_len": 2048, "stack": "megatron-cor"}, "did you mean megatron-core"),
    ({"seq_len": 2048, "flop_convention": "maskd"}, "did you mean masked"),
    ({"seq_len": 2048, "memory_headroom": 1.0}, "memory_headroom=1.0"),
    ({"seq_len": 2048, "memory_headroom": float("nan")}, "memory_headroom=nan"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_RUNS)
def test_wrong_runs(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Training(**arguments)
    assert message in str(caught.value)


def test_precision_that_the_device_lacks() -> None:
    with pytest.raises(InputError, match="a100-sxm-80gb has no fp8 rate"):
        run(Plan(dp=8, global_batch_size=8, precision="fp8"), "dgx-a100", Training(seq_len=2048), Model.load("gpt2"))


@pytest.mark.parametrize(
    "name", ["t5-11b", "bert-base-uncased", "chatglm-6b", "jamba-v0.1", "deepseek-v3", "gemma-2-9b"]
)
def test_every_kind_of_architecture_can_be_estimated(name: str) -> None:
    model = Model.load(name)
    answer = run(Plan(dp=64, global_batch_size=64, zero="3"), training=Training(seq_len=512), model=model)
    assert answer.step_time_s > 0
    assert answer.peak_memory_bytes > 0


def traffic(answer: Estimate) -> dict[tuple[str, str], Any]:
    return {(item.group, item.operation): item for item in answer.communication}


def test_full_sharding_gathers_twice_and_reduces_once_per_micro_batch() -> None:
    model = Model.load("llama-2-7b")
    plan = Plan(dp=64, zero="3", global_batch_size=256)
    found = traffic(run(plan, training=Training(seq_len=2048, stack="torchtitan"), model=model))
    # 32 layers, the embedding and the head are gathered forward and again backward, four micro-batches.
    assert found["dp", "all_gather"].calls == 2 * 34 * 4
    assert found["dp", "reduce_scatter"].calls == 34 * 4
    assert found["dp", "all_gather"].size_bytes == 2 * 4 * 2 * model.parameters.total
    assert found["dp", "reduce_scatter"].size_bytes == 4 * 4 * model.parameters.total


def test_zero_2_reduces_gradients_of_every_micro_batch() -> None:
    model = Model.load("llama-2-7b")
    answers = {
        zero: run(Plan(dp=64, zero=zero, global_batch_size=512), training=Training(seq_len=2048), model=model)
        for zero in ("1", "2")
    }
    calls = {zero: traffic(answer)["dp", "reduce_scatter"].calls for zero, answer in answers.items()}
    assert calls == {"1": 1, "2": 8}
    shown = {zero: answer.time.by_cause["data_parallel"] for zero, answer in answers.items()}
    overlap = Training(seq_len=2048).software.overlap
    reduce = traffic(answers["1"])["dp", "reduce_scatter"].time_s
    # The reduction fits beside the backward pass of a micro-batch, so each one shows its exposed share.
    assert shown["2"] - shown["1"] == pytest.approx(7 * overlap.gradient_exposed.si * reduce, rel=1e-9)


def test_traffic_that_does_not_fit_beside_the_computation_shows() -> None:
    # One short sequence: gathering 7 B parameters over the network takes longer than computing with them.
    model = Model.load("llama-2-7b")
    training = Training(seq_len=128, stack="torchtitan")
    answer = run(Plan(dp=64, zero="3", global_batch_size=64), training=training, model=model)
    found = traffic(answer)
    unhidden = found["dp", "all_gather"].time_s + found["dp", "reduce_scatter"].time_s
    compute = sum(answer.time.by_cause[cause] for cause in ("matmul", "attention", "elementwise", "host"))
    share = training.software.overlap.fully_sharded_exposed.si
    assert unhidden > compute
    assert answer.time.by_cause["data_parallel"] >= unhidden - compute + share * compute * 0.5
    assert answer.time.by_cause["data_parallel"] < unhidden


def test_a_layer_is_never_faster_than_the_host_can_launch_it() -> None:
    training = Training(seq_len=16, stack="megatron-deepspeed")
    answer = run(Plan(dp=8, global_batch_size=8), "dgx-a100", training, Model.load("gpt2"))
    costs = training.software.costs
    floor = costs.host_per_layer_forward.si * (1 + costs.host_backward_ratio.si)
    layers = answer.time.by_cause
    # Twelve layers wait for the host; the embedding and the head do not.
    inside = sum(layers[cause] for cause in ("matmul", "attention", "elementwise", "host"))
    assert layers["host"] > 0
    assert inside >= 12 * floor
    assert inside < 12 * floor * 1.2


def test_launches_show_most_where_they_take_as_long_as_the_kernels() -> None:
    # A norm of 4: twice the time of two equal sides shows as 2^(1/4), a tenth of the other side hardly at all.
    assert launch_s(1.0, 1.0, 4) == pytest.approx(2**0.25 - 1)
    assert launch_s(0.1, 1.0, 4) == pytest.approx(0.25e-4, rel=1e-3)
    assert launch_s(1.0, 0.1, 4) == pytest.approx(0.9, rel=1e-4)


@given(st.floats(0, 10), st.floats(0, 10), st.floats(1, 12))
def test_host_and_device_take_between_the_longer_and_both(host: float, device: float, join: float) -> None:
    together = device + launch_s(host, device, join)
    assert max(host, device) * (1 - 1e-12) <= together <= (host + device) * (1 + 1e-12)


def test_few_key_value_heads_are_replicated_not_split() -> None:
    layer = LLAMA.graph.layers[0]
    keys = next(op for op in layer.operators if op.name == "attention_core").inputs[1].axes[1]
    widths = [Layout(tp=tp).size(keys) for tp in (1, 2, 8, 16, 64)]
    assert widths == [8 * 128, 4 * 128, 128, 128, 128]


def test_gathered_layers_of_full_sharding_by_hand() -> None:
    model = Model.load("llama-2-7b")
    plan = Plan(dp=64, zero="3", global_batch_size=64)
    kinds = run(plan, training=Training(seq_len=2048, stack="torchtitan"), model=model).stages[0].by_kind
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    outside = 2 * 32000 * 4096 + 4096
    # In bf16: the layer at work, the one fetched ahead, one layer's gradient; embedding, last norm and head.
    assert kinds["gathered"] == 2 * (3 * layer + outside)


def test_recomputed_layers_wait_for_the_host_too() -> None:
    training = Training(seq_len=16, stack="megatron-deepspeed")
    plan = Plan(dp=8, global_batch_size=8, recompute=Recompute(kind="full"))
    answer = run(plan, "dgx-a100", training, Model.load("gpt2"))
    floor = 12 * training.software.costs.host_per_layer_forward.si
    # Tiny kernels: the norm of host and device is hardly more than the host's time.
    assert floor <= answer.time.by_cause["recompute"] < 1.01 * floor


def test_gradients_are_added_by_kernels_of_their_own_unless_fused() -> None:
    model, seq_len = Model.load("olmo-7b"), 2048
    plain = Training(seq_len=seq_len, stack="megatron-deepspeed")
    costs = plain.software.costs
    none = msgspec.structs.replace(costs.gradient_accumulation, value=0)
    fused = msgspec.structs.replace(plain.software, costs=msgspec.structs.replace(costs, gradient_accumulation=none))

    def elementwise(stack: Any, batch: int, zero: Any = "1") -> float:
        plan = Plan(dp=8, global_batch_size=8 * batch, zero=zero)
        answer = run(plan, "dgx-a100", Training(seq_len=seq_len, stack=stack), model)
        return answer.time.by_cause["elementwise"]

    # Six bytes of 6.9 B parameters at 0.8 of 2,039 GB/s, for every micro-batch but the first.
    added = elementwise(plain.software, 4) - elementwise(fused, 4)
    assert added == pytest.approx(3 * 6 * model.parameters.total / (0.8 * 2.039e12), rel=0.01)
    assert elementwise(plain.software, 1) == elementwise(fused, 1)
    assert elementwise(plain.software, 4, "3") == elementwise(fused, 4, "3")


def test_overflow_on_any_rank_is_found() -> None:
    from simllm.training.step import Step

    # One micro-batch, so that no rank holds more of them than another.
    plan = Plan(pp=8, dp=64, global_batch_size=64, recompute=Recompute(kind="full"))
    step = Step(LLAMA, Cluster.load("dgx-h100", 512), plan, TRAINING)
    peaks = [stage.peak_bytes for stage in step.memory()]
    assert peaks.index(max(peaks)) != 0  # the logits make the last rank the fullest
    for usable in (*peaks, max(peaks) - 1, min(peaks) - 1):
        assert (step.first_overflow(usable) is None) == (max(peaks) <= usable)
