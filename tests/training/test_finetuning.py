"""Fine-tuned graphs in the engine: what is frozen costs no gradient, and everything else follows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simllm import Cluster, Model, Plan, Recompute, Training, estimate
from simllm.errors import InputError, UnsupportedError
from simllm.models.finetuning import method_named
from simllm.models.finetuning.alignment import Frozen, ValueHead
from simllm.models.graph import Implementation, Layout
from simllm.parallel.communication import block_collectives
from simllm.parallel.offload import Offload
from simllm.parallel.stages import block_frozen_bytes, block_weights
from simllm.training.alignment import align
from simllm.training.generation import generate
from simllm.training.offload import HostWork
from simllm.training.step import Step

MODEL = Model.load("llama-2-7b")
ONE = Cluster.load("dgx-a100", 1)
EIGHT = Cluster.load("dgx-a100", 8)
RUN = Training(seq_len=1024, stack="hf-peft")
SINGLE = Plan(zero="0")


def test_frozen_weights_take_their_bytes_and_nothing_else() -> None:
    tuned = MODEL.finetuned("lora", rank=8)
    kinds = estimate(tuned, ONE, SINGLE, RUN).peak_stage.by_kind
    trained = tuned.trainable_parameters
    assert trained == 4194304
    assert kinds["parameters"] == 2 * MODEL.parameters.total + 4 * trained
    assert kinds["gradients"] == 4 * trained
    assert kinds["optimizer"] == 8 * trained


@pytest.mark.parametrize("zero", ["1", "2", "3"])
def test_sharding_divides_states_of_what_is_trained_and_gathers_what_is_stored(zero: str) -> None:
    tuned = MODEL.finetuned("qlora", rank=8)
    plan = Plan(dp=8, zero=zero, global_batch_size=8)  # type: ignore[arg-type]
    step = Step(tuned, EIGHT, plan, RUN)
    frozen = sum(n * sum(block_frozen_bytes(g, step.layout, 2)) for g, n in tuned.graph.parts)
    (memory,) = step.memory()
    trained = tuned.trainable_parameters
    by = 8 if zero == "3" else 1
    assert memory.by_kind["parameters"] == pytest.approx((frozen + 4 * trained) / by)
    assert memory.by_kind["optimizer"] == 8 * trained / 8
    reduced = sum(x.size_bytes for x in step.reductions(*(sum(w) for w in zip(*_weights(tuned, step), strict=True))))
    assert reduced == 4 * trained
    if zero == "3":
        gathered = sum(n * x.size_bytes for g, n in tuned.graph.parts for x in step.block_gathers(g))
        assert gathered == pytest.approx(frozen + 2 * trained)


def _weights(model: Model, step: Step) -> list[tuple[int, int]]:
    return [block_weights(g, step.layout) for g, n in model.graph.parts for _ in range(n)]


def test_paged_states_are_on_the_host_and_cross_its_link() -> None:
    plain, paged = (estimate(MODEL.finetuned("qlora", rank=16, paged=p), ONE, SINGLE, RUN) for p in (False, True))
    moments = 8 * MODEL.finetuned("qlora", rank=16).trainable_parameters
    assert plain.peak_stage.by_kind["optimizer"] == moments
    assert paged.peak_stage.by_kind["optimizer"] == 0
    link = ONE.accelerator.pcie_bandwidth
    assert link is not None
    extra = paged.time.by_cause["optimizer"] - plain.time.by_cause["optimizer"]
    assert extra == pytest.approx(2 * moments / link, rel=0.01)


@pytest.mark.parametrize(("method", "options"), [("qlora", {"paged": True}), ("galore", {})])
def test_an_optimizer_that_stays_on_the_device_is_not_offloaded(method: str, options: dict[str, bool]) -> None:
    plan = replace(SINGLE, offload=Offload.parse("optimizer"))
    with pytest.raises(UnsupportedError, match="offload=optimizer: an optimizer with paged states or projected"):
        estimate(MODEL.finetuned(method, **options), Cluster.load("dgx-h100", 1), plan, RUN)


def test_frozen_weights_are_fetched_from_the_host_with_the_others() -> None:
    plan, cluster = Plan(dp=8, zero="3", global_batch_size=8), Cluster.load("dgx-h100", 8)
    away = replace(plan, offload=Offload.parse("parameters"))
    tuned = MODEL.finetuned("lora", rank=8)
    step = Step(tuned, cluster, away, RUN)
    (stage,) = step.stages
    link = HostWork(step).states_traffic_s(stage)[0]
    assert cluster.host is not None
    frozen, trained = 2 * MODEL.parameters.total, tuned.trainable_parameters
    assert link == pytest.approx((frozen + step.states.gathered * trained) / 8 / cluster.host.link_of(8))
    here = estimate(tuned, cluster, plan, RUN).peak_stage.by_kind["parameters"]
    assert step.memory()[0].host["parameters"] == here > frozen / 8


def test_galore_projects_gradients_down_and_updates_back() -> None:
    """Moments of r max(m, n) elements and a projection of r min(m, n); two products a matrix and step."""
    low, high = (estimate(MODEL.finetuned("galore", rank=rank), ONE, SINGLE, RUN) for rank in (128, 256))
    matrices = [w for g, n in MODEL.graph.layer_parts for w in g.weights if len(w.axes) == 2 for _ in range(n)]
    sides = [(w.axes[0].size, w.axes[1].size) for w in matrices]
    more = sum(128 * (2 * max(s) + min(s)) * 4 for s in sides)
    kinds = (low.peak_stage.by_kind["optimizer"], high.peak_stage.by_kind["optimizer"])
    assert kinds[1] - kinds[0] == more
    full = estimate(MODEL, ONE, SINGLE, RUN)
    assert low.time.by_cause["matmul"] == full.time.by_cause["matmul"]
    flops = sum(2 * 2 * m * n * 128 for m, n in sides)
    assert high.time.by_cause["optimizer"] - low.time.by_cause["optimizer"] > flops / ONE.accelerator.peak_flops["bf16"]


def test_nothing_runs_backward_before_the_first_trained_layer() -> None:
    tuned = MODEL.finetuned("freeze", top=2)
    step = Step(tuned, ONE, SINGLE, RUN)
    bottom, top = tuned.graph.layers[0], tuned.graph.layers[-1]
    cost = step.engine.block(bottom, step.layout, step.groups, Recompute(kind="full"), True)
    assert cost.backward.compute == cost.backward.recompute == 0
    full = Step(MODEL, ONE, SINGLE, RUN)
    assert step.engine.block(top, step.layout, step.groups, Recompute(), True) == full.engine.block(
        MODEL.graph.layers[0], full.layout, full.groups, Recompute(), True
    )
    # The first of the trained layers needs no gradient of its input.
    assert tuned.graph.layers[-2] is not top
    flops = tuned.flops(1024)
    assert flops.training_full_attention < 1.3 * flops.forward_full_attention


def test_collectives_of_gradients_that_nobody_asks_for_are_not_sent() -> None:
    layout = Layout(batch=1, seq_len=64, tp=4, sequence_parallel=True)
    impl = Implementation()

    def backward(model: Model, index: int) -> list[str]:
        items = block_collectives(model.graph.layers[index], layout, impl)
        return [f"{item.op} {item.operator}" for item in items if item.phase == "backward"]

    # Frozen inputs are not gathered again for weight gradients; the first layer reduces no gradient of its input.
    lora = MODEL.finetuned("lora", rank=8, targets=("q_proj", "v_proj"))
    assert len(backward(MODEL, 1)) == 6
    rows = [name for name in backward(lora, 1) if ".lora_" not in name]
    assert rows.count("all_gather qkv") == 0
    assert rows.count("reduce_scatter qkv") == 1
    assert backward(lora, 0).count("reduce_scatter qkv") == 0
    assert not backward(MODEL.finetuned(Frozen()), 1)


def test_row_parallel_pair_adds_its_partial_sums_before_they_are_reduced() -> None:
    layout = Layout(batch=1, seq_len=64, tp=4)
    tuned = MODEL.finetuned("lora", rank=8, targets=("o_proj", "down_proj"))
    forward = [c for c in block_collectives(tuned.graph.layers[1], layout, Implementation()) if c.phase == "forward"]
    assert [(c.op, c.size_bytes) for c in forward] == [("all_reduce", 64 * 4096 * 2)] * 2


def test_quantised_weights_are_cut_on_block_borders() -> None:
    tuned = MODEL.finetuned("qlora", rank=8)
    ok = estimate(tuned, EIGHT, Plan(tp=4, dp=2, global_batch_size=2, sequence_parallel=True), RUN)
    assert ok.step_time_s > 0
    # 11008 inputs over 8 ranks are 1376: not a multiple of 64.
    with pytest.raises(InputError, match=r"tp=8 cuts down.weight \(nf4 in blocks of 64\) into pieces of 1376 x 4096"):
        estimate(tuned, EIGHT, Plan(tp=8, global_batch_size=1, sequence_parallel=True), RUN)


def test_virtual_tokens_take_room_in_the_context() -> None:
    gpt2 = Model.load("gpt2")
    for method in ("prompt", "prefix", "p-tuning"):
        tuned = gpt2.finetuned(method, virtual_tokens=24)
        assert estimate(tuned, ONE, SINGLE, replace(RUN, seq_len=1000)).step_time_s > 0
        with pytest.raises(InputError, match="seq_len=1001 and virtual_tokens=24 exceed the context of gpt2"):
            estimate(tuned, ONE, SINGLE, replace(RUN, seq_len=1001))


def test_expanding_weights_costs_time_and_a_buffer() -> None:
    # Without recomputation the same operators run; only storage differs.
    options = {"rank": 16, "targets": ("all-linear",)}
    plain, packed = (estimate(MODEL.finetuned(m, **options), ONE, SINGLE, RUN) for m in ("lora", "qlora"))
    assert packed.time.by_cause["matmul"] == plain.time.by_cause["matmul"]
    expanded = 6476005376 * (0.5 + 1 / 64 + 4 / (64 * 256) + 2) * 2
    extra = packed.time.by_cause["elementwise"] - plain.time.by_cause["elementwise"]
    moved = extra * ONE.accelerator.memory_bandwidth
    assert expanded < moved < 1.5 * expanded
    assert packed.peak_memory_bytes < plain.peak_memory_bytes - 8e9


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 64), more=st.integers(1, 64), batch=st.integers(1, 4))
def test_a_higher_rank_and_more_targets_take_more(rank: int, more: int, batch: int) -> None:
    plan = replace(SINGLE, micro_batch_size=batch, global_batch_size=batch)

    def ask(r: int, targets: tuple[str, ...]) -> tuple[float, float]:
        answer = estimate(MODEL.finetuned("lora", rank=r, targets=targets), ONE, plan, RUN)
        return answer.peak_memory_bytes, answer.step_time_s

    small, larger = ask(rank, ("q_proj",)), ask(rank + more, ("q_proj",))
    everywhere = ask(rank, ("all-linear",))
    assert small[0] < larger[0]
    assert small[0] < everywhere[0]
    assert small[1] < everywhere[1]


# -- alignment and generation ----------------------------------------------------------------------------------------


def test_flops_of_generated_tokens_add_up_to_those_of_the_sequence() -> None:
    """Prefill of 48 tokens and 16 tokens one by one ask for the same pairs as 64 at once."""
    core = next(op for op in MODEL.graph.layers[0].operators if op.name == "attention_core")
    impl = Implementation()

    def masked(layout: Layout) -> int:
        return sum(work.masked_flops for work in core.forward(layout, impl))

    steps = sum(masked(Layout(batch=2, seq_len=1, cached=c)) for c in range(48, 64))
    assert masked(Layout(batch=2, seq_len=48)) + steps == masked(Layout(batch=2, seq_len=64))


def test_generation_reads_weights_and_cache() -> None:
    plan, run = Plan(zero="0"), Training(seq_len=1024)
    made = generate(MODEL, ONE, plan, run, batch=1, prompt_len=512, response_len=128)
    assert made.cache_bytes == MODEL.kv_cache_bytes_per_token() * 640
    # No token is faster than one reading of the weights.
    weights = 2 * (MODEL.parameters.total - MODEL.parameters.embedding)
    assert made.decode_s / 128 > weights / ONE.accelerator.memory_bandwidth
    assert made.prefill_s < 128 * made.decode_s
    larger = generate(MODEL, ONE, plan, run, batch=8, prompt_len=512, response_len=128)
    assert made.decode_s < larger.decode_s < 8 * made.decode_s
    with pytest.raises(InputError, match="response_len=0 must be a whole number"):
        generate(MODEL, ONE, plan, run, batch=1, prompt_len=512, response_len=0)


def test_a_frozen_model_only_goes_forward() -> None:
    answer = estimate(MODEL.finetuned(Frozen()), ONE, SINGLE, RUN)
    kinds = answer.peak_stage.by_kind
    assert kinds["activations"] == kinds["gradients"] == kinds["optimizer"] == 0
    assert kinds["parameters"] == 2 * MODEL.parameters.total
    step = Step(MODEL, ONE, SINGLE, RUN)
    (stage,) = step.stages
    assert answer.step_time_s == pytest.approx(step.stage_time(stage).forward.total)


def test_value_head_has_one_column() -> None:
    judge = MODEL.finetuned(ValueHead(inner=None))
    assert judge.parameters.total == MODEL.parameters.total - 32000 * 4096 + 4096
    tuned = MODEL.finetuned(ValueHead(inner=method_named("lora", rank=8)))
    assert tuned.trainable_parameters == 4194304 + 4096


@pytest.mark.parametrize("lora", [None, method_named("lora", rank=8)])
def test_alignment_is_the_sum_of_its_passes(lora: object) -> None:
    plan = Plan(dp=8, zero="3", global_batch_size=16, micro_batch_size=1)
    tasks = {
        task: align(task, MODEL, EIGHT, plan, RUN, method=lora)  # type: ignore[arg-type]
        for task in ("sft", "reward", "dpo", "orpo", "ppo")
    }
    for answer in tasks.values():
        assert answer.step_time_s == pytest.approx(sum(one.time_s for one in answer.passes))
    policy = MODEL.finetuned(lora) if lora else MODEL  # type: ignore[arg-type]
    assert tasks["sft"].step_time_s == estimate(policy, EIGHT, plan, RUN).step_time_s
    pairs = replace(plan, micro_batch_size=2, global_batch_size=32)
    trained = estimate(policy, EIGHT, pairs, RUN).step_time_s
    reference = estimate(MODEL.finetuned(Frozen()), EIGHT, pairs, RUN).step_time_s
    assert tasks["orpo"].step_time_s == trained
    assert tasks["dpo"].step_time_s == pytest.approx(trained + reference)
    # Beside adapters the reference is the policy's own base.
    assert (tasks["dpo"].kept_bytes["reference"] == 0) == (lora is not None)
    assert [one.name for one in tasks["ppo"].passes] == ["generate", *["score"] * 4, *["train"] * 2]
    twice = align("ppo", MODEL, EIGHT, plan, RUN, method=lora, epochs=2)  # type: ignore[arg-type]
    training = sum(one.time_s for one in tasks["ppo"].passes if one.name == "train")
    assert twice.step_time_s - tasks["ppo"].step_time_s == pytest.approx(training)


def test_models_apart_need_more_gpus_and_less_of_each() -> None:
    plan = Plan(dp=8, zero="3", global_batch_size=16)
    together, apart = (
        align("ppo", MODEL, EIGHT, plan, RUN, placement=where)  # type: ignore[arg-type]
        for where in ("together", "apart")
    )
    assert apart.gpus == 4 * together.gpus
    assert apart.peak_memory_bytes < together.peak_memory_bytes
    assert apart.step_time_s < together.step_time_s
    with pytest.raises(InputError, match="placement=apart is for ppo"):
        align("dpo", MODEL, EIGHT, plan, RUN, placement="apart")
