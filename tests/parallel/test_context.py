"""The kinds of context parallelism: their collectives by hand from the papers, and what they must share."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simllm.errors import InputError
from simllm.hardware import Cluster
from simllm.hardware.stack import load_stack
from simllm.models import Model
from simllm.models.activations import Recompute, saved_bytes
from simllm.models.build import build_graph
from simllm.models.context import CP_COMM_TYPES, CpCommType
from simllm.models.graph import Graph, Implementation, Layout
from simllm.models.operators import Attention
from simllm.models.work import AttentionWork
from simllm.network import Group
from simllm.parallel.communication import Collective, block_collectives
from simllm.parallel.placement import group_of
from simllm.parallel.plan import Plan, check_plan, inner_degree
from simllm.training import Training, estimate
from tests.strategies import gpt_spec

FUSED, EAGER = Implementation(), Implementation(context_steps="eager")
AUTOGRAD = Implementation(context_output="kept")


def layout(kind: CpCommType, cp: int, seq_len: int, inner: int = 0, **more: int | bool) -> Layout:
    plan = Plan(cp=cp, cp_comm_type=kind, cp_a2a=inner, tp=int(more.pop("tp", 1)))
    return replace(plan.layout(seq_len), **more)


def context(graph: Graph, where: Layout, impl: Implementation = FUSED) -> list[Collective]:
    return [c for c in block_collectives(graph, where, impl) if c.group.startswith("cp")]


def sizes(found: list[Collective], op: str, phase: str) -> list[float]:
    return [c.size_bytes for c in found if (c.op, c.phase) == (op, phase) for _ in range(c.count)]


def attention(graph: Graph) -> Attention:
    return next(operator for operator in graph.operators if isinstance(operator, Attention))


def kernels(graph: Graph, where: Layout, impl: Implementation, backward: bool = False) -> list[AttentionWork]:
    core = attention(graph)
    work = core.backward_input(where, impl) if backward else core.forward(where, impl)
    return [item for item in work if isinstance(item, AttentionWork)]


# -- the papers by hand --------------------------------------------------------------------------------------------


def test_ulysses_sends_four_nh_over_p_each_way() -> None:
    # arXiv:2309.14509, section 3.2: all-to-alls of q, k, v (3Nh in all) and of the output (Nh), Nh/P of each a rank;
    # autograd exchanges the four gradients the same way.
    n, h, p = 4096, 1024, 8
    found = context(build_graph(gpt_spec()).layers[0], layout("a2a", p, n), AUTOGRAD)
    assert {(c.op, c.group) for c in found} == {("all_to_all", "cp")}
    for phase in ("forward", "backward"):
        assert sizes(found, "all_to_all", phase) == [2 * n * h / p] * 4
    # TransformerEngine keeps the output by tokens only, and exchanges it again for its backward kernel.
    assert sizes(context(build_graph(gpt_spec()).layers[0], layout("a2a", p, n)), "all_to_all", "backward") == (
        [2 * n * h / p] * 5
    )


def test_ulysses_sends_few_key_value_heads_and_repeats_them_where_they_are_too_few() -> None:
    layer = Model.load("llama-3-8b").graph.layers[0]  # 32 heads of 128, 8 for keys and values
    own = 2 * 16384 / 8 * 4096
    assert sizes(context(layer, layout("a2a", 8, 16384)), "all_to_all", "forward") == [own, own / 4, own / 4, own]
    # 32 ranks, each with one query head: every key-value head goes to four of them.
    assert sizes(context(layer, layout("a2a", 32, 16384)), "all_to_all", "forward") == [own / 4] * 4


def test_llama_3_gathers_keys_and_values() -> None:
    # arXiv:2407.21783, section 3.3.2: K and V of 131,072 tokens, 8 heads of 128, tp 8, cp 16, in bf16.
    layer = Model.load("llama-3.1-405b").graph.layers[0]
    where = layout("all_gather", 16, 131072, tp=8, sequence_parallel=True)
    found, whole = context(layer, where), 131072 * 1 * 128 * 2
    assert Counter((c.op, c.phase) for c in found) == {
        ("all_gather", "forward"): 2,
        ("all_gather", "backward"): 2,
        ("reduce_scatter", "backward"): 2,
    }
    assert {c.size_bytes for c in found} == {whole}


def test_ring_passes_keys_and_values_on() -> None:
    # arXiv:2310.01889, section 3: cp - 1 hops of K and V; backward the gradients beside them.
    layer = Model.load("llama-3-8b").graph.layers[0]
    part = 2 * 16384 / 4 * 8 * 128 * 2
    found = context(layer, layout("p2p", 4, 16384))
    assert (sizes(found, "send_recv", "forward"), sizes(found, "send_recv", "backward")) == ([part] * 3, [2 * part] * 3)
    # PyTorch's gradients are float32 and go all the way round, also where keys and values were gathered.
    ring, gathered = (context(layer, layout(kind, 4, 16384), EAGER) for kind in ("p2p", "all_gather"))
    assert sizes(ring, "send_recv", "backward") == [part] * 3 + [2 * part] * 4
    assert sizes(gathered, "send_recv", "backward") == [2 * part] * 4
    assert not sizes(gathered, "reduce_scatter", "backward")


def test_two_levels_send_what_each_of_them_does() -> None:
    # arXiv:2405.07719, section 3: an all-to-all over 4 ranks, and a ring over 2 whose parts are of the same size.
    layer = Model.load("llama-3-8b").graph.layers[0]
    found = context(layer, layout("a2a+p2p", 8, 16384, 4))
    own = 2 * 16384 / 8 * 4096
    assert [c.size_bytes for c in found if c.group == "cp_heads" and c.phase == "forward"] == [
        own,
        own / 4,
        own / 4,
        own,
    ]
    assert [(c.size_bytes, c.count) for c in found if c.group == "cp_ring" and c.phase == "forward"] == [(own / 2, 1)]
    plan = Plan(tp=2, cp=8, cp_comm_type="a2a+p2p", cp_a2a=4, sequence_parallel=True)
    assert group_of(plan, "cp_heads") == Group(size=4, stride=2)
    assert group_of(plan, "cp_ring") == Group(size=2, stride=8)


def test_latent_attention_sends_its_expanded_heads() -> None:
    layer = Model.load("deepseek-v3").graph.layers[-1]  # 128 heads of 192 for q and k, of 128 for v
    found = sizes(context(layer, layout("a2a", 4, 8192)), "all_to_all", "forward")
    assert found == [2 * 2048 * 128 * width for width in (192, 192, 128, 128)]


def test_kernels_of_each_kind() -> None:
    layer = Model.load("llama-3-8b").graph.layers[0]
    by_kind = {
        kind: [(k.heads, k.kv_heads, k.seq_q, k.seq_k, k.times) for k in kernels(layer, layout(kind, 4, 8192), FUSED)]
        for kind in ("p2p", "all_gather", "a2a")
    }
    assert by_kind == {
        # The own part under its mask, then half of the queries against each other part.
        "p2p": [(32, 8, 2048, 2048, 1), (32, 8, 1024, 2048, 3)],
        "all_gather": [(32, 8, 2048, 8192, 1)],
        "a2a": [(8, 2, 8192, 8192, 1)],
    }
    two = kernels(layer, layout("a2a+p2p", 4, 8192, 2), FUSED)
    assert [(k.heads, k.kv_heads, k.seq_q, k.seq_k, k.times) for k in two] == [
        (16, 4, 4096, 4096, 1),
        (16, 4, 2048, 4096, 1),
    ]
    # PyTorch attends to gathered keys in parts too.
    assert kernels(layer, layout("all_gather", 4, 8192), EAGER) == kernels(layer, layout("p2p", 4, 8192), EAGER)


def test_copies_around_the_kernels() -> None:
    from simllm.models.work import Stream

    layer = Model.load("llama-3-8b").graph.layers[0]
    q, kv = 2 * 2048 * 4096, 2 * 2048 * 1024  # bytes of a rank's queries, and of its keys

    def moved(kind: CpCommType, impl: Implementation = FUSED) -> list[float]:
        core, where = attention(layer), layout(kind, 4, 8192)
        passes = core.forward(where, impl), core.backward_input(where, impl)
        return [sum(item.bytes for item in work if isinstance(item, Stream)) for work in passes]

    # Two copies of what is exchanged: q, k, v and the output; backward the output, again, and four gradients.
    assert moved("a2a") == [4 * (2 * q + 2 * kv), 4 * (3 * q + 2 * kv)]
    # Three steps of the ring, each adds half of the output; backward half of dq, and dk and dv.
    assert moved("p2p") == [3 * 3 * q / 2, 3 * 3 * (q / 2 + 2 * kv)]
    # Gathered keys and values put in order; backward again, and their gradients cleared, added to, put back.
    assert moved("all_gather") == [2 * 4 * 2 * kv, 8 * 4 * 2 * kv]
    # PyTorch in float32: 19 bytes for each byte of the output, 5 of dq, 11 of dk and dv, in each of three steps.
    assert moved("all_gather", EAGER) == [3 * 19 * q, 3 * (5 * q + 11 * 2 * kv)]


# -- what all kinds share ------------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> tuple[Graph, Layout, list[Layout]]:
    """A layer, its layout without context parallelism, and one with each kind."""
    name = draw(
        st.sampled_from(["gpt3-13b", "llama-3-8b", "llama-2-7b", "deepseek-v2-lite", "falcon-7b", "gemma-2-9b"])
    )
    layer = draw(st.sampled_from(Model.load(name).graph.layers[:2]))
    cp, batch = draw(st.sampled_from([2, 4, 8])), draw(st.sampled_from([1, 3]))
    seq_len = cp * 2 * draw(st.integers(8, 300))
    whole = Layout(batch=batch, seq_len=seq_len)
    found = []
    for kind in CP_COMM_TYPES:
        inner = [n for n in (2, 4) if n < cp] if kind == "a2a+p2p" else [0]
        found += [layout(kind, cp, seq_len, n, batch=batch) for n in inner]
    model = Model.load(name)
    able = [one for one in found if _fits(model, one)]
    return layer, whole, able


def _fits(model: Model, where: Layout) -> bool:
    kinds = {(1, False): "p2p", (1, True): "all_gather", (where.cp, False): "a2a"}
    kind = kinds.get((where.cp_heads, where.cp_gathers), "a2a+p2p")
    plan = Plan(cp=where.cp, cp_comm_type=kind, cp_a2a=where.cp_heads if kind == "a2a+p2p" else 0)  # type: ignore[arg-type]
    try:
        check_plan(model, plan, where.seq_len)
    except InputError:
        return False
    return True


@settings(deadline=None)
@given(cases())
def test_all_kinds_compute_the_same(case: tuple[Graph, Layout, list[Layout]]) -> None:
    layer, whole, kinds = case
    for backward in (False, True):
        alone = sum(k.masked_flops for k in kernels(layer, whole, FUSED, backward))
        for where in kinds:
            for impl in (FUSED, EAGER):
                own = sum(k.masked_flops for k in kernels(layer, where, impl, backward))
                # A rank's share of the pairs is rounded in each of its kernels.
                assert own * where.cp == pytest.approx(alone, rel=1e-9, abs=where.cp * 2), (where, impl)


@settings(deadline=None)
@given(cases())
def test_all_kinds_keep_the_same_for_the_backward_pass(case: tuple[Graph, Layout, list[Layout]]) -> None:
    layer, _, kinds = case
    core = attention(layer)
    ring = next(where for where in kinds if where.cp_heads == 1 and not where.cp_gathers)
    for where in kinds:
        more = saved_bytes(layer, where, FUSED) - saved_bytes(layer, ring, FUSED)
        heads = core.shape(where).kv_heads
        repeated = max(1, where.cp_heads // heads) - 1
        keys = sum(where.elements(t) for t in core.inputs[1:3]) * 2
        assert more == pytest.approx(repeated * keys)
        kept = saved_bytes(layer, where, AUTOGRAD) - saved_bytes(layer, where, FUSED)
        assert kept == (where.elements(core.outputs[0]) * 2 if where.cp_heads > 1 else 0)
        # What runs again keeps nothing of that.
        assert saved_bytes(layer, where, AUTOGRAD, Recompute(kind="full")) == saved_bytes(
            layer, ring, FUSED, Recompute(kind="full")
        )


@settings(deadline=None)
@given(cases())
def test_bytes_of_each_kind_follow_from_its_tensors(case: tuple[Graph, Layout, list[Layout]]) -> None:
    # Whatever the kind, a rank receives at most the keys and values of the whole sequence in a forward pass, or its own
    # share of what is exchanged, and at least nothing.
    layer, _, kinds = case
    core = attention(layer)
    for where in kinds:
        q, k, v, out = core.context_bytes(where, FUSED)
        found = context(layer, where)
        sent = sum(c.size_bytes * c.count for c in found if c.phase == "forward")
        parts = where.cp // where.cp_heads
        exchanged = q + k + v + out if where.cp_heads > 1 else 0
        passed = 0 if parts == 1 else (k + v) * (parts if where.cp_gathers else parts - 1)
        assert sent == pytest.approx(exchanged + passed)


def test_buffers_of_each_kind() -> None:
    layer = Model.load("llama-3-8b").graph.layers[0]
    q, keys = 2 * 2048 * 4096, 2 * 2 * 2048 * 1024
    core = attention(layer)
    assert core.buffers(layout("p2p", 4, 8192), FUSED) == 4 * keys  # two parts with their gradients
    assert core.buffers(layout("p2p", 4, 8192), EAGER) == 2 * keys + 2 * 2 * keys  # in float32
    assert core.buffers(layout("all_gather", 4, 8192), FUSED) == 2 * 4 * keys  # all of them, and their gradients
    assert core.buffers(layout("a2a", 4, 8192), FUSED) == 2 * q + keys
    assert core.buffers(layout("a2a", 4, 8192), AUTOGRAD) == q + keys
    assert core.buffers(Layout(seq_len=8192), FUSED) == 0


# -- what a plan may be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"cp_comm_type": "a2a"}, ["cp_comm_type=a2a needs cp above 1"]),
        ({"cp": 4, "cp_comm_type": "ulysses"}, ["kind of context parallelism", "all_gather"]),
        ({"cp": 8, "cp_comm_type": "a2a+p2p"}, ["cp_a2a=0", "use 2 or 4"]),
        ({"cp": 2, "cp_comm_type": "a2a+p2p", "cp_a2a": 2}, ["use a2a or p2p"]),
        ({"cp": 4, "cp_comm_type": "a2a", "cp_a2a": 2}, ["only a2a+p2p has two levels"]),
    ],
)
def test_plans_that_contradict_themselves(fields: dict[str, object], said: list[str]) -> None:
    with pytest.raises(InputError) as error:
        Plan(**fields)  # type: ignore[arg-type]
    for words in said:
        assert words in str(error.value)


def test_heads_must_divide() -> None:
    llama = Model.load("llama-3-8b")  # 32 heads, 8 for keys and values
    for cp in (2, 8, 16, 32):
        check_plan(llama, Plan(cp=cp, cp_comm_type="a2a"), 8192)
    with pytest.raises(InputError, match=r"cp=64 with cp_comm_type=a2a: .* has 32 attention heads; use 1 or 2 or"):
        check_plan(llama, Plan(cp=64, cp_comm_type="a2a"), 8192)
    with pytest.raises(InputError, match="has 8 attention heads"):
        check_plan(llama, Plan(tp=4, sequence_parallel=True, cp=16, cp_comm_type="a2a"), 8192)
    gpt2 = Model.load("gpt2")  # 12 heads
    check_plan(gpt2, Plan(cp=4, cp_comm_type="a2a"), 1024)
    with pytest.raises(InputError, match="12 attention heads"):
        check_plan(gpt2, Plan(cp=8, cp_comm_type="a2a"), 1024)
    qwen = Model.load("qwen2.5-32b")  # 40 heads, 8 for keys and values
    with pytest.raises(InputError, match=r"8 key-value heads, and one number must divide the other"):
        check_plan(qwen, Plan(cp=5, cp_comm_type="a2a"), 8000)


def test_levels_that_nobody_chose() -> None:
    heads = Model.load("llama-3-70b").spec.attentions  # 64 heads, 8 for keys and values
    assert inner_degree(heads, 1, 16, 8) == 8  # a node
    assert inner_degree(heads, 4, 16, 8) == 2  # what tensor parallelism leaves of it
    assert inner_degree(heads, 8, 16, 8) == 2  # the smallest there is
    assert inner_degree(heads, 1, 2, 8) == 0
    assert inner_degree(Model.load("gpt2").spec.attentions, 1, 10, 8) == 2  # 12 heads: not 5


# -- the step ------------------------------------------------------------------------------------------------------


def priced(kind: CpCommType, stack: str = "megatron-core", cp: int = 8, inner: int = 0, gpus: int = 8):  # type: ignore[no-untyped-def]
    plan = Plan(cp=cp, cp_comm_type=kind, cp_a2a=inner, dp=gpus // cp, zero="3", global_batch_size=gpus // cp)
    model, cluster = Model.load("llama-3-8b"), Cluster.load("dgx-h100", gpus)
    return estimate(model, cluster, plan, Training(seq_len=131072, stack=stack))


def test_what_shows_of_each_kind() -> None:
    shown = {kind: priced(kind).time.by_cause["context_parallel"] for kind in ("p2p", "all_gather", "a2a")}
    alone = {
        kind: sum(t.time_s for t in priced(kind).communication if t.group == "cp")
        for kind in ("p2p", "all_gather", "a2a")
    }
    # A ring hides behind attention but for a tenth; TransformerEngine gathers first; exchanges stand alone.
    assert shown["p2p"] == pytest.approx(0.1 * alone["p2p"])
    assert shown["all_gather"] == pytest.approx(alone["all_gather"])
    assert shown["a2a"] == pytest.approx(alone["a2a"])
    # PyTorch attends to its own keys meanwhile.
    eager = priced("all_gather", "torchtitan")
    assert eager.time.by_cause["context_parallel"] < 0.2 * sum(t.time_s for t in eager.communication if t.group == "cp")


def test_gathered_keys_cost_little_beside_attention_in_long_sequences() -> None:
    # arXiv:2407.21783, section 3.3.2: K and V are much smaller than Q, and attention is quadratic where the gather is
    # linear: about an order of magnitude. Its long-context training: 131,072 tokens, tp 8, cp 16, over InfiniBand.
    plan = Plan(tp=8, cp=16, pp=16, dp=8, cp_comm_type="all_gather", sequence_parallel=True, global_batch_size=128)
    model, cluster = Model.load("llama-3.1-405b"), Cluster.load("dgx-h100", 16384)
    by_cause = {
        seq_len: estimate(model, cluster, plan, Training(seq_len=seq_len)).time.by_cause for seq_len in (32768, 131072)
    }
    long, short = by_cause[131072], by_cause[32768]
    assert 0.05 * long["attention"] < long["context_parallel"] < 0.2 * long["attention"]
    assert short["context_parallel"] / short["attention"] > 2 * long["context_parallel"] / long["attention"]


def test_kinds_take_time_in_the_order_of_their_traffic_across_nodes() -> None:
    # 32 ranks on four nodes: the exchange of all heads crosses InfiniBand, two levels keep it inside a node.
    flat, two = priced("a2a", cp=32, gpus=32), priced("a2a+p2p", cp=32, inner=8, gpus=32)
    assert {t.group: t.ranks for t in two.communication if t.group.startswith("cp_")} == {"cp_heads": 8, "cp_ring": 2}
    assert two.time.by_cause["context_parallel"] < 0.5 * flat.time.by_cause["context_parallel"]
    assert {t.bottleneck for t in two.communication if t.group == "cp_heads"} == {"nvlink4"}


def test_stacks_have_the_kind_of_their_software() -> None:
    found = {name: Training(seq_len=1, stack=name).context_kind(4) for name in ("megatron-core", "torchtitan", "xla")}
    assert found == {"megatron-core": "p2p", "torchtitan": "all_gather", "xla": "all_gather"}
    assert Training(seq_len=1, stack="megatron-deepspeed").context_kind(4) == "a2a"
    assert Training(seq_len=1, stack="megatron-deepspeed").context_kind(1) == "p2p"
    assert load_stack("torchtitan").kernels.context_steps == "eager"


def test_recomputation_sends_the_forward_traffic_again() -> None:
    def shown(recompute: str) -> float:
        plan = Plan(cp=8, cp_comm_type="a2a", zero="3", recompute=Recompute.parse(recompute))
        answer = estimate(Model.load("llama-3-8b"), Cluster.load("dgx-h100", 8), plan, Training(seq_len=32768))
        return answer.time.by_cause["recompute"]

    exchanges = context(Model.load("llama-3-8b").graph.layers[0], layout("a2a", 8, 32768))
    volume = sum(c.size_bytes for c in exchanges if c.phase == "forward")
    assert volume == 2 * 4096 * (2 * 4096 + 2 * 1024)
    assert shown("full") > 32 * volume * 7 / 8 / 450e9  # at least the wire time of one forward pass of 32 layers


def test_shape_of_a_rank_is_that_of_the_model_over_its_degrees() -> None:
    core = attention(Model.load("llama-3-8b").graph.layers[0])
    shape = core.shape(layout("a2a", 4, 8192, tp=2))
    assert (shape.heads, shape.kv_heads, shape.seq_q) == (16, 4, 8192)
    assert prod((shape.heads, shape.head_dim)) == 2048
