"""The cluster and the plan of a published run, with an assumption for every cell that is not stated."""

from __future__ import annotations

import re
from functools import lru_cache
from math import gcd

from simllm.errors import InputError
from simllm.hardware import Cluster, load_cluster, make_cluster
from simllm.hardware.stack import Stack
from simllm.models import Model
from simllm.models.activations import Recompute, second_products
from simllm.models.context import CpCommType
from simllm.models.spec import MoESpec
from simllm.parallel.plan import Plan, Zero, even_split
from simllm.parallel.schedules import SCHEDULES
from simllm.validation.row_stack import MEGATRON_UNTIL_2022
from simllm.validation.system_names import system_in
from simllm.validation.table import Row

__all__ = ["run_cluster", "run_plan"]

#: Stacks from before sequence parallelism (arXiv:2205.05198, 2022), and one that has its own form of it.
_WITHOUT_SEQUENCE_PARALLEL = frozenset({"megatron-lm", "megatron-deepspeed", "internevo"})

#: What a stack shards when the row does not say: FSDP and XLA everything; Megatron nothing until its distributed
#: optimizer of 2022, the optimizer states since.
_USUAL_ZERO: dict[str, Zero] = {
    "fsdp1": "3",
    "fsdp1-compiled": "3",
    "torchtitan": "3",
    "torchtitan-eager": "3",
    "automodel": "3",
    "xla": "3",
    "megatron-lm": "0",
    "megatron-deepspeed": "0",
}

#: Stacks that recompute whole layers unless told otherwise: MaxText's remat_policy is "full", Paxml's and
#: AutoModel's benchmark recipes switch checkpointing on.
_RECOMPUTES_BY_DEFAULT = frozenset({"xla", "automodel"})

#: What is kept under remat_policy=save_qkv_proj, the setting of NVIDIA's MaxText recipes (NVIDIA/dgxc-benchmarking
#: maxtext/configure.sh); the last product of a layer is never run again, because no backward needs its output.
_KEPT_BY_GPU_RECIPES = ("qkv", "down")
_CUDA_DEVICES = ("v100", "a100", "h100", "h200", "b200", "b300", "gb200", "gb300")

#: Words of a network's description and the link class they mean.
_NETWORKS = (("roce", "roce"), ("tcpxo", "gpudirect-tcpxo"), ("tcpx", "gpudirect-tcpx"), ("efa", "efa"))

#: What settings and notes say of context parallelism, and the kind that they mean.
_CONTEXT_KINDS: tuple[tuple[str, CpCommType], ...] = (
    (r"\bcp (?:via|by|over) (?:a2a|all.?to.?all)|ulysses", "a2a"),
    (r"\bcp (?:via|by|over) all.?gather", "all_gather"),
    (r"\bcp (?:via|by|over) (?:p2p|ring)|ring attention", "p2p"),
)

_SCHEDULES = {
    "1f1b": "1f1b",
    "gpipe": "gpipe",
    "interleaved": "interleaved",
    "interleaved-1f1b": "interleaved",
    "1f1b-i": "interleaved",
    "1f1b-interleaved": "interleaved",
    "zb-2p*": "zb-2p",  # the same schedule with another micro-batch, arXiv:2401.10241, table 6
    **{name: name for name in SCHEDULES},
}


@lru_cache(maxsize=1024)
def _cluster(gpu: str, num_gpus: int, per_node: int | None, network: float | None, link: str | None) -> Cluster:
    return make_cluster(
        accelerator=gpu,
        num_gpus=num_gpus,
        gpus_per_node=per_node,
        scaleout_bandwidth_per_node=network,
        scaleout_link=link,
    )


def run_cluster(row: Row) -> Cluster:
    """The cluster of a row: its devices, nodes and network as far as they are stated."""
    gpu = row.text("gpu")
    if not gpu:
        raise InputError("gpu is not stated")
    num_gpus = row.needed_integer("n_gpus")
    per_node = row.integer("gpus_per_node")
    network = row.number("node_network_GBps")
    described = row.text("interconnect").casefold()
    machine = system_in(described, gpu)
    if machine is not None and machine.system and per_node in (None, machine.gpus_per_node):
        row.assume(f"the interconnect names {machine.system}: its description is used")
        return load_cluster(machine.system, num_gpus)
    link = next((link for word, link in _NETWORKS if re.search(rf"\b{word}\b", described)), None)
    cluster = _cluster(gpu, num_gpus, per_node, network * 1e9 if network else None, link)
    if per_node is None:
        row.assume(f"gpus_per_node is not stated: {cluster.gpus_per_node}, as in the device's reference system")
    if network is None and cluster.num_domains > 1 and cluster.scaleout_bandwidth_per_node:
        row.assume(
            f"node_network_GBps is not stated: {cluster.scaleout_bandwidth_per_node / 1e9:g}, "
            "as in the device's reference system"
        )
    return cluster


def run_plan(row: Row, model: Model, cluster: Cluster, stack: Stack, base: str, seq_len: int) -> Plan:
    """The plan of a row.

    Parameters
    ----------
    row : Row
    model, cluster, stack
        Of the same row.
    base : str
        Name of the stack before the row's own settings changed it.
    seq_len : int

    Raises
    ------
    InputError
        Cells contradict each other, or what they state is not modelled.
    """
    tp, pp, cp, dp = _degrees(row, cluster.num_gpus)
    ep, etp = _experts(row, model, stack, tp, tp * cp * dp)
    micro_batch, global_batch = _batch(row, dp)
    schedule, vpp = _schedule(row, pp)
    zero = _zero(row, base, dp * cp)
    return Plan(
        tp=tp,
        pp=pp,
        vpp=vpp,
        cp=cp,
        cp_comm_type=_context_kind(row, stack, base, cp),
        ep=ep,
        etp=etp,
        dp=dp,
        zero=zero,
        hsdp_shard=_shard_group(row, dp * cp) if zero == "1" else 0,
        sequence_parallel=_sequence_parallel(row, base, tp),
        micro_batch_size=micro_batch,
        global_batch_size=global_batch,
        recompute=_recompute(row, base, model),
        precision=_precision(row, base, cluster),
        schedule=schedule,
        uneven_layers=_uneven(row, model, pp * vpp),
    )


def _degrees(row: Row, num_gpus: int) -> tuple[int, int, int, int]:
    """tp, pp, cp and dp; what is not stated follows from the others or is 1."""
    stated = {name: row.integer(name) for name in ("tp", "pp", "cp", "dp")}
    if num_gpus > 1 and all(stated[name] is None for name in ("tp", "pp", "dp")):
        raise InputError(f"none of tp, pp and dp is stated: how {num_gpus} GPUs are used is not known")
    for name in ("tp", "pp", "cp"):
        if stated[name] is None:
            row.assume(f"{name} is not stated: 1")
    tp, pp, cp = (stated[name] or 1 for name in ("tp", "pp", "cp"))
    if num_gpus % (tp * pp * cp):
        raise InputError(f"tp={tp} x pp={pp} x cp={cp} = {tp * pp * cp} does not divide n_gpus={num_gpus}")
    dp = num_gpus // (tp * pp * cp)
    if stated["dp"] not in (None, dp):
        raise InputError(
            f"dp={stated['dp']} x tp={tp} x pp={pp} x cp={cp} = {(stated['dp'] or 1) * tp * pp * cp} contradicts "
            f"n_gpus={num_gpus}"
        )
    return tp, pp, cp, dp


def _context_kind(row: Row, stack: Stack, base: str, cp: int) -> CpCommType:
    """How context-parallel ranks come to the keys of all tokens."""
    if cp == 1:
        return "p2p"
    text = " ".join(row.text(name) for name in ("overlap_notes", "notes")).casefold()
    stated = next((kind for pattern, kind in _CONTEXT_KINDS if re.search(pattern, text)), None)
    if stated is None:
        row.assume(f"the kind of context parallelism is not stated: {stack.cp_comm_type}, as {base} does")
    return stated or stack.cp_comm_type


def _experts(row: Row, model: Model, stack: Stack, tp: int, stage_gpus: int) -> tuple[int, int]:
    """Expert parallelism, and tensor parallelism inside an expert."""
    ep = row.integer("ep")
    moe = next((b.mlp for b in model.spec.decoder.layers if isinstance(b.mlp, MoESpec)), None)
    if moe is None:
        if ep not in (None, 1):
            raise InputError(f"ep={ep}, but the model has no experts")
        return 1, 1
    if ep is None:
        row.assume("ep is not stated: 1")
        ep = 1
    etp = 1
    if tp > 1 and stack.expert_tensor_parallel == "tp":
        etp = gcd(tp, gcd(moe.expert.intermediate_size, stage_gpus // gcd(stage_gpus, ep)))
        row.assume(f"experts are split over the tensor-parallel ranks like dense layers: etp={etp}")
    return ep, etp


def _shard_group(row: Row, ranks: int) -> int:
    """Ranks that share one set of optimizer states where the settings name fewer than all; 0 for all."""
    stated = re.search(
        r"sharded (?:over|within) (\d+) (?:ranks|gpus)|zero1=(\d+)", row.text("overlap_notes").casefold()
    )
    size = int(stated[1] or stated[2]) if stated else ranks
    return size if size < ranks and ranks % size == 0 else 0


def _batch(row: Row, dp: int) -> tuple[int, int]:
    """Micro-batch and global batch size; the steps of gradient accumulation must agree with them."""
    micro = row.integer("micro_batch")
    steps = row.integer("grad_accum")
    batch = row.integer("global_batch_seqs")
    if batch is None:
        if micro is None or steps is None:
            raise InputError("global_batch_seqs is not stated, nor both micro_batch and grad_accum")
        batch = micro * steps * dp
        row.assume(f"global_batch_seqs is not stated: micro_batch x grad_accum x dp = {batch}")
    if micro is None:
        follows = steps is not None and batch % (steps * dp) == 0
        micro = batch // (steps * dp) if steps is not None and follows else 1
        why = "global_batch_seqs / (grad_accum x dp) = " if follows else ""
        row.assume(f"micro_batch is not stated: {why}{micro}")
    if steps is not None and micro * steps * dp != batch:
        raise InputError(
            f"micro_batch={micro} x grad_accum={steps} x dp={dp} = {micro * steps * dp} contradicts "
            f"global_batch_seqs={batch}"
        )
    return micro, batch


def _schedule(row: Row, pp: int) -> tuple[str, int]:
    """The pipeline schedule and the model chunks of a rank."""
    stated = row.text("pipeline_schedule").casefold()
    if stated and stated not in _SCHEDULES:
        raise InputError(f"pipeline schedule {stated} is not modelled; modelled are {', '.join(SCHEDULES)}")
    vpp = row.integer("vp")
    if pp == 1:
        return "1f1b", 1
    schedule = _SCHEDULES.get(stated) or ("interleaved" if (vpp or 1) > 1 else "1f1b")
    if not stated:
        row.assume(f"pipeline_schedule is not stated: {schedule}")
    chunks = SCHEDULES[schedule].chunks
    if chunks == 0 and vpp is None:
        raise InputError(f"the {schedule} schedule needs vp, the model chunks of a rank, which is not stated")
    if vpp is None:
        row.assume(
            "vp is not stated: 1, not interleaved" if chunks == 1 else f"vp is not stated: {chunks}, as {schedule} has"
        )
    if chunks and (vpp or chunks) != chunks:
        raise InputError(f"pipeline_schedule={stated} contradicts vp={vpp}")
    if schedule == "interleaved" and vpp == 1:
        return "1f1b", 1
    return schedule, vpp or chunks


def _uneven(row: Row, model: Model, chunks: int) -> bool:
    """Whether the layers divide over the chunks of the pipeline, the embedding and the head counted or not."""
    layers = model.spec.num_hidden_layers
    if even_split(layers, chunks) is not None:
        return False
    what = "the last chunks are shorter" if chunks <= layers else "the embedding and the head have chunks of their own"
    row.assume(f"{layers} layers over {chunks} pipeline chunks: {what}")
    return True


def _zero(row: Row, base: str, ranks: int) -> Zero:
    """The ZeRO stage."""
    known: dict[str, Zero] = {"0": "0", "1": "1", "2": "2", "3": "3", "hsdp": "hsdp"}
    stated = row.text("zero").casefold().removesuffix(".0")
    if stated:
        if stated not in known:
            raise InputError(f"zero={stated!r} is none of {', '.join(known)}")
        return known[stated]
    usual = _USUAL_ZERO.get(base, "1")
    if ranks > 1:
        row.assume(f"zero is not stated: {usual}, as {base} does")
    return usual


def _sequence_parallel(row: Row, base: str, tp: int) -> bool:
    """Sequence parallelism, which only exists beside tensor parallelism."""
    stated = row.flag("sequence_parallel")
    if tp == 1:
        return False
    if stated is not None:
        return stated
    usual = base not in _WITHOUT_SEQUENCE_PARALLEL
    row.assume(f"sequence_parallel is not stated: {'on' if usual else 'off'}, as {base} does")
    return usual


def _recompute(row: Row, base: str, model: Model) -> Recompute:
    """What runs again in the backward pass."""
    stated = row.text("recompute").casefold()
    maxtext = row.text("framework").casefold().startswith("maxtext")
    if not stated and maxtext and row.text("gpu").startswith(_CUDA_DEVICES):
        again = tuple(name for name in _layer_operators(model) if name not in _KEPT_BY_GPU_RECIPES)
        row.assume("recompute is not stated: MaxText's GPU recipes keep the projections of query, key and value")
        return Recompute(kind="list", operators=again)
    if not stated:
        usual = "full" if base in _RECOMPUTES_BY_DEFAULT else "none"
        row.assume(f"recompute is not stated: {usual}, as {base} does")
        return Recompute.parse(usual)
    if stated == "selective" and base.startswith("torchtitan"):
        policy = second_products(model.graph.layers)
        row.assume(f"selective recomputation of torchtitan runs {', '.join(policy.operators)} again")
        return policy
    if stated == "selective" and base == "xla":
        row.assume("selective recomputation of MaxText keeps a few named tensors: taken as full")
        return Recompute.parse("full")
    return Recompute.parse(stated)


def _layer_operators(model: Model) -> tuple[str, ...]:
    """Names of the operators in the model's layers, in order."""
    return tuple(dict.fromkeys(operator.name for graph in model.graph.layers for operator in graph.operators))


def _precision(row: Row, base: str, cluster: Cluster) -> str:
    """The precision of the matrix products."""
    stated = row.text("precision").casefold()
    if stated:
        return stated
    usual = "bf16" if base not in MEGATRON_UNTIL_2022 and "bf16" in cluster.accelerator.peak_flops else "fp16"
    row.assume(f"precision is not stated: {usual}")
    return usual
