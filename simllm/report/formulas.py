"""How every part of a time and of a memory comes about, in a line each, for people who want to check it."""

from __future__ import annotations

from rich.table import Table

from simllm.planner.reasons import CAUSES
from simllm.report.estimates import MEMORY
from simllm.report.text import table
from simllm.training import Estimate
from simllm.units import format_bytes, format_duration

__all__ = ["formulas_table"]

#: Cause of time -> formula, and where it is from.
_TIME = {
    "matmul": (
        "2 m n k / (peak FLOP/s x efficiency of the tiles and waves of m, n, k), summed over the products of a "
        "micro-batch, forward and twice backward",
        "curves fitted to kernel measurements (hardware_profiles/kernels)",
    ),
    "attention": (
        "FLOPs of the attention core / (peak FLOP/s x measured efficiency by sequence and head size)",
        "curves fitted to kernel measurements (hardware_profiles/kernels)",
    ),
    "elementwise": (
        "bytes read and written / (memory bandwidth x efficiency) + a launch for each kernel",
        "roofline (Williams 2009, CACM 52:65)",
    ),
    "tensor_parallel": (
        "latency + S / B + c sqrt(S) of every collective of size S, times the share that the software leaves visible",
        "Hockney's model with a ramp, fitted to nccl-tests; sizes: arXiv:2205.05198, section 4",
    ),
    "context_parallel": (
        "what shows beside attention: max(0, T - A) + share x min(T, A) of a ring, the same of gathered keys beside "
        "attention to a rank's own, all of what trades tokens for heads",
        "arXiv:2310.01889; arXiv:2407.21783, section 3.3.2; arXiv:2309.14509",
    ),
    "expert_parallel": (
        "all-to-all of the tokens to their experts and back, times the share that shows",
        "arXiv:2006.16668; link figures fitted to nccl-tests",
    ),
    "data_parallel": (
        "reductions of gradients and gathers of parameters beyond the pass they run beside: "
        "max(0, T - W) + share x min(T, W)",
        "arXiv:1910.02054, section 7",
    ),
    "host": ("what the host needs to launch a layer beyond what the device needs to run it", "software stack profile"),
    "recompute": ("everything that runs again in the backward pass", "arXiv:2205.05198, section 5"),
    "pipeline_p2p": ("transfers of a micro-batch between ranks x micro-batches, as far as they show", "link figures"),
    "pipeline_bubble": (
        "one micro-batch through all other ranks / vpp (equal ranks: (pp - 1) / (vpp m) of the work)",
        "arXiv:2104.04473, section 2.2",
    ),
    "offload": (
        "transfers over the host link beyond the passes they run beside: max(0, T - W) + share x min(T, W)",
        "arXiv:2101.06840, section 4; arXiv:2104.07857, section 6.1",
    ),
    "optimizer": ("bytes of states and gradients read and written / memory bandwidth", "roofline"),
    "gradient_clipping": (
        "gradients read for their norm, read and written to scale them / memory bandwidth; an all-reduce; two launches",
        "arXiv:1211.5063, section 3.2",
    ),
}
#: Kind of memory -> formula, and where it is from.
_MEMORY = {
    "parameters": ("parameters on the rank x bytes of the compute copy, over the shards of ZeRO 3", "arXiv:1910.02054"),
    "gradients": ("parameters on the rank x bytes of a gradient, over the shards from ZeRO 2", "arXiv:1910.02054"),
    "optimizer": (
        "parameters on the rank x bytes of master and moments, over the shards from ZeRO 1",
        "arXiv:1910.02054",
    ),
    "activations": (
        "tensors that the backward pass needs, a layer x layers x micro-batches in flight",
        "fold over the graph; arXiv:2205.05198, section 4",
    ),
    "working": ("largest tensors alive at the peak beyond those kept", "fold over the graph"),
    "gathered": ("parameters of the blocks that are gathered at a time", "software stack profile"),
    "buffers": ("buckets that gradients and parameters are communicated from", "software stack profile"),
    "context": ("CUDA context, libraries and buffers of the communication library", "software stack profile"),
}


def formulas_table(answer: Estimate) -> Table:
    """Every part of the step and of the peak with its value, formula and source."""
    rows = [
        (CAUSES[cause], format_duration(seconds), *_TIME[cause])
        for cause, seconds in answer.time.by_cause.items()
        if seconds > 0
    ]
    rows += [
        (MEMORY[kind], format_bytes(size), *_MEMORY[kind]) for kind, size in answer.peak_stage.by_kind.items() if size
    ]
    columns = ("part", "value", "formula", "source")
    return table(columns, rows, left=("part", "formula", "source"), wrap=("formula", "source"))
