"""``simllm validate torch``: a plan executed by PyTorch, every quantity held against its prediction."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from simllm.cli.options import Json, Output, count, load_model
from simllm.cli.output import check_output, emit, progress
from simllm.cli.validate_device import device_steps
from simllm.errors import InputError
from simllm.units import parse_positive, parse_seq_len

if TYPE_CHECKING:
    from simllm.parallel.plan import Plan, Zero
    from simllm.validation.execution.case import Case
    from simllm.validation.execution.compare import Comparison

__all__ = ["torch"]

#: More parameters than this are not executed for real unless asked for: ranks share one machine.
_SMALL = 20_000_000


def torch(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="As everywhere; left out with --matrix.")
    ] = None,
    tp: Annotated[str, typer.Option("--tp", metavar="N", help="Tensor parallelism.")] = "1",
    pp: Annotated[str, typer.Option("--pp", metavar="N", help="Pipeline parallelism.")] = "1",
    vpp: Annotated[str, typer.Option("--vpp", metavar="N", help="Model chunks per pipeline rank.")] = "1",
    ep: Annotated[str, typer.Option("--ep", metavar="N", help="Expert parallelism.")] = "1",
    dp: Annotated[
        str | None, typer.Option("--dp", metavar="N", help="Data parallelism. Default: the ranks over tp x pp.")
    ] = None,
    zero: Annotated[
        str,
        typer.Option(
            "--zero",
            metavar="STAGE",
            help="0: DistributedDataParallel, 1: with ZeroRedundancyOptimizer, 2, 3, hsdp: FSDP2.",
        ),
    ] = "0",
    hsdp_shard: Annotated[
        str | None, typer.Option("--hsdp-shard", metavar="N", help="Ranks that share a copy in hsdp. Default: half.")
    ] = None,
    sequence_parallel: Annotated[
        bool | None,
        typer.Option(
            "--sequence-parallel/--no-sequence-parallel", help="Default: with tp above 1.", show_default=False
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule",
            metavar="NAME",
            help="gpipe, 1f1b, interleaved, looped-bfs, interleaved-zb, zb-v or dualpipe-v.",
        ),
    ] = None,
    recompute: Annotated[
        str, typer.Option("--recompute", metavar="POLICY", help="none, selective, full or every:N.")
    ] = "none",
    precision: Annotated[
        str, typer.Option("--precision", metavar="NAME", help="fp32, or bf16 through FSDP2's mixed precision.")
    ] = "fp32",
    micro_batch_size: Annotated[
        str, typer.Option("--micro-batch-size", metavar="N", help="Sequences per data-parallel rank and micro-step.")
    ] = "1",
    global_batch_size: Annotated[
        str | None,
        typer.Option("--global-batch-size", metavar="N", help="Sequences per step. Default: 2 pp micro-batches."),
    ] = None,
    seq_len: Annotated[str, typer.Option("--seq-len", metavar="S", help="Tokens in a sequence.")] = "64",
    offload: Annotated[bool, typer.Option("--offload", help="FSDP2's CPU offload of the states.")] = False,
    unfused: Annotated[bool, typer.Option("--unfused", help="Attention as explicit products.")] = False,
    ranks: Annotated[
        str | None, typer.Option("--ranks", metavar="N", help="Processes to start. Default: what the plan needs.")
    ] = None,
    world_size: Annotated[
        str | None, typer.Option("--world-size", metavar="N", help="With --fake: ranks of the cluster.")
    ] = None,
    backend: Annotated[str, typer.Option("--backend", metavar="NAME", help="gloo (CPUs) or nccl (GPUs).")] = "gloo",
    fake: Annotated[
        bool,
        typer.Option(
            "--fake", help="One process stands for a whole cluster: the model in full size, tensors without memory."
        ),
    ] = False,
    full_size: Annotated[
        bool, typer.Option("--full-size", help="Execute the model as it is, not one of the same parts made small.")
    ] = False,
    layers: Annotated[str, typer.Option("--layers", metavar="N", help="Layers of the small model.")] = "4",
    hidden_size: Annotated[str, typer.Option("--hidden-size", metavar="N", help="Width of the small model.")] = "64",
    matrix: Annotated[bool, typer.Option("--matrix", help="Every strategy on every kind of model instead.")] = False,
    table: Annotated[
        str | None,
        typer.Option("--table", metavar="FILE", help="With --matrix: CSV that keeps what was executed; goes on there."),
    ] = None,
    timed_steps: Annotated[
        str | None, typer.Option("--timed-steps", metavar="N", help="Also time so many steps, without a recorder.")
    ] = None,
    timeout: Annotated[
        str, typer.Option("--timeout", metavar="S", help="Seconds after which a rank that does not answer has hung.")
    ] = "300",
    device: Annotated[
        str | None,
        typer.Option(
            "--device", metavar="NAME", help="Instead of a plan: time real steps of MODEL on one device, cpu or cuda."
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option("--profile", metavar="FILE", help="With --device: what simllm calibrate --device wrote here."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", metavar="NAME", help="With --device: also predict from a system of the catalog."),
    ] = None,
    steps: Annotated[
        str, typer.Option("--steps", metavar="N", help="With --device: steps timed of a case in each round.")
    ] = "10",
    rounds: Annotated[str, typer.Option("--rounds", metavar="N", help="With --device: rounds over all cases.")] = "3",
    threads: Annotated[
        str | None, typer.Option("--threads", metavar="N", help="With --device cpu: threads, as in the calibration.")
    ] = None,
    as_json: Json = False,
    output: Output = None,
) -> int:
    """Execute a plan with real PyTorch and compare every quantity with its prediction.

    Ranks are processes of this machine, or those of torchrun. A model that is too large for that is replaced by one of
    the same parts made small. Needs torch: pip install "simllm[validate]". Exit status 1: a quantity is off, or a rank
    failed.

    \b
    Examples:
      simllm validate torch llama-3-70b --tp 2 --dp 2 --zero 3
      simllm validate torch llama-3-70b --fake --world-size 1024 --tp 8 --zero 3 --precision bf16 --seq-len 8k
      simllm validate torch --matrix --table matrix.csv
      simllm validate torch gpt2 --device cpu --threads 1 --profile my-box.yaml --seq-len 256,512 --recompute full
    """
    check_output(output)
    if device is not None:
        if model is None:
            raise InputError("give the MODEL that is to be trained on the device")
        if recompute not in ("none", "full"):
            raise InputError(f"--recompute={recompute} with --device must be none or full (both are timed then)")
        return device_steps(
            model,
            device,
            profile=profile,
            shipped=cluster,
            seq_lens=seq_len,
            batch=micro_batch_size,
            precision=precision,
            recompute=recompute == "full",
            steps=steps,
            rounds=rounds,
            threads=threads,
            as_json=as_json,
            output=output,
        )
    if profile is not None or cluster is not None or threads is not None:
        raise InputError("--profile, --cluster and --threads are for timing steps on one device: give --device too")
    limit = parse_positive(timeout, "--timeout")
    if backend not in ("gloo", "nccl"):
        raise InputError(f"--backend={backend} must be gloo or nccl")
    if matrix:
        return _matrix(None if table is None else Path(table), limit, as_json, output)
    if table is not None:
        raise InputError("--table keeps what --matrix executes: give --matrix too")
    if model is None:
        raise InputError("give a MODEL, or --matrix")
    spec = load_model(model).spec
    if not (fake or full_size or load_model(model).parameters.total <= _SMALL):
        from simllm.validation.execution.sizes import shrink

        spec = shrink(spec, count(layers, "--layers"), count(hidden_size, "--hidden-size"))
    if fake and world_size is None and dp is None:
        raise InputError("--fake needs --world-size or --dp")
    tensor, pipeline = count(tp, "--tp"), count(pp, "--pp")
    data = _data_parallel(dp, world_size if fake else ranks, tensor, pipeline)
    micro = count(micro_batch_size, "--micro-batch-size")
    chunks = count(vpp, "--vpp")
    plan = _plan(
        tp=tensor,
        pp=pipeline,
        vpp=chunks,
        ep=count(ep, "--ep"),
        dp=data,
        zero=cast("Zero", zero),
        hsdp_shard=0 if hsdp_shard is None else count(hsdp_shard, "--hsdp-shard"),
        sequence_parallel=tensor > 1 if sequence_parallel is None else sequence_parallel,
        micro_batch_size=micro,
        global_batch_size=(
            (2 * pipeline if pipeline > 1 else 1) * micro * data
            if global_batch_size is None
            else count(global_batch_size, "--global-batch-size")
        ),
        recompute=recompute,
        precision=precision,
        schedule=schedule or ("interleaved" if chunks > 1 else "1f1b"),
    )
    if ranks is not None and count(ranks, "--ranks") != plan.num_gpus and not fake:
        raise InputError(f"--ranks={ranks}, but the plan has {plan.num_gpus} ranks")
    timed = 0 if timed_steps is None else count(timed_steps, "--timed-steps", 1000)
    from simllm.validation.execution.session import make_case

    length = parse_seq_len(seq_len, "--seq-len")
    case = make_case(spec, plan, length, offload=offload, unfused=unfused, timed_steps=timed)
    _answer(case, fake, backend, limit, as_json, output)
    return 0


def _data_parallel(dp: str | None, ranks: str | None, tp: int, pp: int) -> int:
    if dp is not None:
        return count(dp, "--dp")
    if ranks is None:
        return 1
    number = count(ranks, "--ranks or --world-size")
    if number % (tp * pp):
        raise InputError(f"tp={tp} x pp={pp} does not divide the {number} ranks")
    return number // (tp * pp)


def _plan(*, recompute: str, **degrees: object) -> Plan:
    from simllm.models.activations import Recompute
    from simllm.parallel.plan import Plan

    return Plan(recompute=Recompute.parse(recompute), **degrees)  # type: ignore[arg-type]


def _answer(case: Case, fake: bool, backend: str, timeout_s: float, as_json: bool, output: str | None) -> None:
    from simllm.report.execution import comparison_report
    from simllm.validation.execution.session import execute_case, execute_fake, execute_under_torchrun

    comparison: Comparison | None
    try:
        if fake:
            comparison = execute_fake(case)
        elif "TORCHELASTIC_RUN_ID" in os.environ:
            comparison = execute_under_torchrun(case, backend, timeout_s)
        else:
            comparison = execute_case(case, backend, timeout_s)
    except ChildProcessError as error:
        sys.stderr.write(f"simllm: {error}\n")
        raise typer.Exit(1) from None
    if comparison is None:
        return  # rank 0 answers for all
    answer = comparison
    emit(answer.to_dict, lambda: comparison_report(answer), as_json, output)
    if not answer.ok:
        raise typer.Exit(1)


def _matrix(path: Path | None, timeout_s: float, as_json: bool, output: str | None) -> int:
    from simllm.report.execution import matrix_report
    from simllm.validation.execution.matrix import run_matrix

    with progress("cases executed") as tick:
        rows = run_matrix(path=path, timeout_s=timeout_s, progress=tick)
    emit(lambda: [row.to_dict() for row in rows], lambda: matrix_report(rows), as_json, output)
    return 0 if all(row.ok or row.status == "refused" for row in rows) else 1
