"""Memory of a rank: what schedules hold, what software keeps beside it, and how tools show it."""

from __future__ import annotations

import pytest

from simllm import Cluster, Model, Plan, Training, estimate
from simllm.hardware.stack import load_stack
from simllm.models.activations import Recompute, saved_bytes
from simllm.models.graph import Implementation, Layout
from simllm.parallel.memory import weight_gradient_bytes
from simllm.parallel.stages import pipeline_stages
from simllm.parallel.states import state_bytes
from simllm.training import Estimate


def gpt(layers: int = 16, hidden: int = 1024) -> Model:
    sizes = {"n_layer": layers, "n_embd": hidden, "n_head": hidden // 64, "n_positions": 1024, "vocab_size": 50304}
    return Model.from_config({"model_type": "gpt2", **sizes})


def ask(schedule: str, vpp: int = 1, pp: int = 4, batch: int = 16, simulate: bool = False, **more: object) -> Estimate:
    plan = Plan(pp=pp, vpp=vpp, schedule=schedule, global_batch_size=batch, precision="fp16", **more)  # type: ignore[arg-type]
    training = Training(seq_len=1024, stack="megatron-lm")
    return estimate(gpt(), Cluster.load("dgx-a100", pp), plan, training, simulate=simulate)


def test_between_input_and_weight_gradient_a_layer_holds_32sbh() -> None:
    # Qi 2023 (arXiv:2401.10241), section 2.2: M_W = 32 s b h of a GPT layer.
    stage = pipeline_stages(gpt().graph, 4, 1)[1]
    layout = Layout(batch=2, seq_len=1024)
    implementation = Implementation(attention="unfused")
    assert weight_gradient_bytes(stage, layout, implementation) == stage.num_layers * 32 * 1024 * 2 * 1024


@pytest.mark.parametrize(("schedule", "vpp"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("looped-bfs", 2)])
def test_walking_the_table_holds_what_the_closed_form_says(schedule: str, vpp: int) -> None:
    closed, walked = ask(schedule, vpp), ask(schedule, vpp, simulate=True)
    # The embedding's dropout mask on one chunk apart, all chunks are equal here.
    for one, other in zip(closed.stages, walked.stages, strict=True):
        assert other.in_flight == pytest.approx(one.in_flight)
        assert other.peak_bytes == pytest.approx(one.peak_bytes, rel=0.01)


def test_zero_bubble_memory() -> None:
    plain = ask("1f1b").stages
    one = plain[1].by_kind["activations"] / plain[1].in_flight  # a micro-batch on an inner rank
    # 2p - 1 forwards of the second rank of ZB-H2 less what earlier input gradients have let go of; ZB-H1 holds p.
    for schedule, least, most in (("zb-h1", 3, 4), ("zb-h2", 5, 7), ("zb-1p", 3, 4), ("zb-2p", 5, 8)):
        held = ask(schedule).stages[1].by_kind["activations"] / one
        assert least < held <= most + 1e-9
    both = ask("dualpipe")
    assert both.stages[1].by_kind["parameters"] == pytest.approx(
        plain[1].by_kind["parameters"] + plain[2].by_kind["parameters"]
    )


def test_all_forwards_first_keeps_the_logits_of_all() -> None:
    first, alternating = ask("gpipe").stages[-1], ask("1f1b").stages[-1]
    logits = 1024 * 50304 * load_stack("megatron-lm").costs.logits_saved.si
    m = first.in_flight
    per_micro_batch = alternating.by_kind["activations"] / alternating.in_flight
    assert first.by_kind["activations"] - m * per_micro_batch == pytest.approx((m - 1) * logits, rel=0.1)


def test_one_group_of_micro_batches_alternates_too() -> None:
    """Megatron-Core and PyTorch: the last of 4 ranks runs 4 forwards of its first chunk, then one, and goes back."""
    stages = ask("interleaved", 2, batch=4).stages
    assert [stage.in_flight for stage in stages] == [4, 4, 3.5, 2.5]


def test_torchtitan_keeps_every_second_product() -> None:
    """arXiv:2410.06511, section 2.1.3: of q, k, v, o, gate, up, down every second one runs again."""
    model = Model.load("llama-3-8b")
    layer = model.graph.layers[0]
    policy = Recompute.parse("list:mixer_norm,k,rope,o,mlp_norm,up,act")
    elements = saved_bytes(layer, Layout(seq_len=8192), Implementation(), policy) / 2 / 8192
    # Input, q, v, context, residual, gate; and 4 bytes of attention statistics a head.
    assert elements == pytest.approx(4096 + 4096 + 1024 + 4096 + 4096 + 14336 + 2 * 32, rel=1e-3)
    whole = Recompute.parse("list:mixer_norm,qkv,rope,o,mlp_norm,gate_up,act")
    assert saved_bytes(layer, Layout(seq_len=8192), Implementation(), whole) / 2 / 8192 == pytest.approx(
        4096 + 4096 + 4096 + 2 * 32, rel=1e-3
    )


def test_deepspeed_has_an_optimizer_for_each_16_bits() -> None:
    stack = load_stack("megatron-deepspeed")
    half, brain = state_bytes(stack, "fp16"), state_bytes(stack, "bf16")
    # fp16: 4 bytes and buckets, bf16: 10 bytes; 16 more sharded in both.
    assert (half.parameter + half.gradient, half.buckets) == (4, 4e9)
    assert (brain.parameter + brain.gradient, brain.buckets) == (10, 0)
    assert half.master == brain.master == 8


def test_views_of_the_peak() -> None:
    stage = ask("1f1b").peak_stage
    assert stage.views["nvidia_smi"] == stage.peak_bytes
    assert stage.views["nvidia_smi"] - stage.views["max_allocated"] == stage.by_kind["context"]
