"""Options that several commands share, and how their words become quantities.

Quantities are read as text and parsed by `simllm.units`, so that `8k` and `256MB` work everywhere and every wrong
number is answered in the same words.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from simllm.errors import InputError
from simllm.units import parse_bytes, parse_count, parse_positive, parse_seq_len

if TYPE_CHECKING:
    from simllm.hardware import Cluster
    from simllm.models import Model
    from simllm.training import Training
    from simllm.training.operation import Operation

__all__ = [
    "MOST_GPUS",
    "CapacityFactor",
    "CheckpointInterval",
    "ClusterName",
    "ExpertImbalance",
    "FlopConvention",
    "GlobalBatchSize",
    "Gpus",
    "GradientClipping",
    "GradientPrecision",
    "GridIntensity",
    "Headroom",
    "Json",
    "MasterWeights",
    "MaybeGlobalBatchSize",
    "MaybeModelName",
    "ModelName",
    "Mtbf",
    "NodePower",
    "OptimizerName",
    "Output",
    "Overwrite",
    "Plot",
    "Precision",
    "Price",
    "Pue",
    "Report",
    "Restart",
    "Sensitivity",
    "SeqLen",
    "StackName",
    "StorageBandwidth",
    "Tokens",
    "Trace",
    "count",
    "load_cluster",
    "load_model",
    "make_training",
    "optional_operation",
    "optional_tokens",
    "sequence_length",
    "size_bytes",
]

#: Beyond any machine that exists or is planned: a typing error, not a question.
MOST_GPUS = 10_000_000

#: What a sequence is cut to when nothing is said, and what stands in for a context length that a model does not state.
_LONGEST_DEFAULT, _NO_CONTEXT = 8192, 2048

_MODEL = typer.Argument(
    metavar="MODEL", help="A name of the catalog, a Hugging Face config.json, or a folder holding one."
)
ModelName = Annotated[str, _MODEL]
MaybeModelName = Annotated[str | None, _MODEL]
ClusterName = Annotated[
    str,
    typer.Option(
        "--cluster", metavar="NAME", help="A system of the catalog (see simllm hardware list) or a YAML file."
    ),
]
Gpus = Annotated[str, typer.Option("--gpus", metavar="N", help="GPUs in use: at most one node, or whole nodes.")]
_GLOBAL_BATCH_SIZE = typer.Option("--global-batch-size", metavar="N", help="Sequences per optimizer step.")
GlobalBatchSize = Annotated[str, _GLOBAL_BATCH_SIZE]
MaybeGlobalBatchSize = Annotated[str | None, _GLOBAL_BATCH_SIZE]
SeqLen = Annotated[
    str | None,
    typer.Option(
        "--seq-len",
        metavar="S",
        help="Tokens in a sequence, such as 4096 or 8k. Default: the model's context length, at most 8k "
        "(2k where the model states none).",
    ),
]
Tokens = Annotated[
    str | None,
    typer.Option("--tokens", metavar="T", help="Tokens of the whole run, such as 15T: days, hours, USD."),
]
Price = Annotated[
    str | None,
    typer.Option(
        "--price",
        "--price-per-gpu-hour",
        metavar="USD",
        help="USD per GPU-hour. Default: the list price in the device's profile.",
    ),
]
Mtbf = Annotated[
    str | None,
    typer.Option("--mtbf", metavar="HOURS", help="Between failures of one GPU. Default: as in published runs."),
]
Restart = Annotated[
    str | None,
    typer.Option("--restart", metavar="MINUTES", help="To restart after a failure. Default: as in published runs."),
]
StorageBandwidth = Annotated[
    str | None,
    typer.Option(
        "--storage-bandwidth",
        metavar="B/S",
        help="At which the job writes checkpoints, such as 500GB (a second). Default: as in published runs.",
    ),
]
CheckpointInterval = Annotated[
    str | None,
    typer.Option("--checkpoint-interval", metavar="MINUTES", help="Between checkpoints. Default: the best one."),
]
NodePower = Annotated[
    str | None,
    typer.Option(
        "--node-power", metavar="F", help="Power of a node over the TDP of its GPUs. Default: as measured on H100."
    ),
]
Pue = Annotated[
    str | None,
    typer.Option("--pue", metavar="F", help="Energy of the building over that of the nodes. Default: nodes alone."),
]
GridIntensity = Annotated[
    str | None,
    typer.Option("--grid-intensity", metavar="KG", help="kgCO2e per kWh of the grid. Default: emissions not stated."),
]
Sensitivity = Annotated[
    bool,
    typer.Option("--sensitivity", help="Also say what a tenth more of each bandwidth, memory, ... would change."),
]
Report = Annotated[
    str | None,
    typer.Option("--report", metavar="FILE.html", help="Also write one self-contained HTML page with plots."),
]
Trace = Annotated[
    str | None,
    typer.Option(
        "--trace", metavar="FILE.json", help="Also write the pipeline's timeline for Perfetto or chrome://tracing."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
Precision = Annotated[
    str, typer.Option("--precision", metavar="NAME", help="bf16, fp16, fp32, tf32, fp8, mxfp8 or nvfp4.")
]
StackName = Annotated[
    str, typer.Option("--stack", metavar="NAME", help="Software stack; simllm hardware list names them.")
]
Headroom = Annotated[
    str,
    typer.Option(
        "--memory-headroom", metavar="F", help="Fraction of the device memory to leave free for fragmentation."
    ),
]
OptimizerName = Annotated[
    str,
    typer.Option("--optimizer", metavar="NAME", help="adam, sgd, sgd-momentum, adafactor, adam-8bit or muon."),
]
MasterWeights = Annotated[
    bool | None,
    typer.Option(
        "--master-weights/--no-master-weights",
        help="Keep float32 parameters, or all states in 16 bits. Default: what the stack does.",
        show_default=False,
    ),
]
GradientPrecision = Annotated[
    str | None,
    typer.Option(
        "--gradient-precision",
        metavar="NAME",
        help="fp32 or bf16, of accumulated gradients. Default: what the stack does.",
    ),
]
GradientClipping = Annotated[
    bool,
    typer.Option(
        "--gradient-clipping/--no-gradient-clipping",
        help="Scale gradients down to a largest norm over all parameters.",
    ),
]
ExpertImbalance = Annotated[
    str,
    typer.Option(
        "--expert-imbalance",
        metavar="X",
        help="Tokens of the busiest expert-parallel rank over the mean; random: what chance gives.",
    ),
]
CapacityFactor = Annotated[
    str | None,
    typer.Option(
        "--capacity-factor",
        metavar="C",
        help="Tokens of an expert over its mean share, padded up to it; the rest is dropped. Default: no limit.",
    ),
]
FlopConvention = Annotated[
    str,
    typer.Option(
        "--flop-convention",
        metavar="NAME",
        help="How MFU counts: full-attention, masked, 6n, 6n-non-embedding, palm, torchtitan or with-recompute.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document with SI units.")]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Write the answer to FILE instead of standard output; as JSON with --json or a name ending in .json.",
    ),
]
Plot = Annotated[str | None, typer.Option("--plot", metavar="FILE", help="Also draw a picture: .png, .svg or .pdf.")]


def count(text: str, option: str, maximum: float = MOST_GPUS) -> int:
    """A whole number above zero, named by its option when it is wrong."""
    return parse_count(text, option, maximum)


def size_bytes(text: str, option: str) -> int:
    """A number of bytes."""
    return parse_bytes(text, option)


def fraction(text: str, option: str) -> float:
    """A number from 0 up to, not including, 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise InputError(f"{option}={text} must be a number of at least 0 and below 1, such as 0.05")
    return value


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        also = ", or random" if option == "--expert-imbalance" else ""
        raise InputError(f"{option}={text} must be a number such as 1.25{also}") from None


def optional_tokens(text: str | None) -> int | None:
    """The tokens of a run, where they were given."""
    return None if text is None else parse_count(text, "--tokens")


def optional_operation(
    tokens: int | None,
    price: str | None,
    mtbf: str | None = None,
    restart: str | None = None,
    storage_bandwidth: str | None = None,
    checkpoint_interval: str | None = None,
    node_power: str | None = None,
    pue: str | None = None,
    grid_intensity: str | None = None,
) -> Operation:
    """How the cluster is operated, as far as it was said; without a run such options would do nothing."""
    from simllm.training.operation import Operation

    given = {
        "--price": price,
        "--mtbf": mtbf,
        "--restart": restart,
        "--storage-bandwidth": storage_bandwidth,
        "--checkpoint-interval": checkpoint_interval,
        "--node-power": node_power,
        "--pue": pue,
        "--grid-intensity": grid_intensity,
    }

    def number(option: str, factor: float = 1.0, maximum: float = 1e12) -> float | None:
        text = given[option]
        return None if text is None else parse_positive(text, option, maximum) * factor

    if pue is not None and parse_positive(pue, "--pue", 100) < 1:
        raise InputError(f"--pue={pue} must be at least 1; a building uses more than its nodes")
    operation = Operation(
        usd_per_gpu_hour=number("--price", maximum=1e6),
        gpu_mtbf_s=number("--mtbf", 3600),
        restart_s=number("--restart", 60),
        storage_bandwidth=None if storage_bandwidth is None else parse_bytes(storage_bandwidth, "--storage-bandwidth"),
        checkpoint_interval_s=number("--checkpoint-interval", 60),
        node_power=number("--node-power", maximum=100),
        pue=number("--pue", maximum=100),
        kg_co2e_per_kwh=number("--grid-intensity", maximum=100),
    )
    named = [option for option, text in given.items() if text is not None]
    if tokens is None and named:
        verb = "describes" if len(named) == 1 else "describe"
        raise InputError(f"{', '.join(named)} {verb} a whole run; give its tokens too, such as --tokens 15T")
    return operation


def sequence_length(text: str | None, model: Model) -> int:
    """The length asked for, or the default that the help states."""
    if text is not None:
        return parse_seq_len(text, "--seq-len")
    return min(model.spec.context_length or _NO_CONTEXT, _LONGEST_DEFAULT)


def load_model(name: str) -> Model:
    """The model meant by MODEL."""
    from simllm.models import Model

    return Model.load(name)


def load_cluster(name: str, gpus: str) -> Cluster:
    """The cluster meant by --cluster and --gpus."""
    from simllm.hardware import load_cluster

    return load_cluster(name, count(gpus, "--gpus"))


def make_training(
    model: Model,
    seq_len: str | None,
    stack: str,
    headroom: str,
    optimizer: str,
    master_weights: bool | None,
    gradient_precision: str | None,
    flop_convention: str,
    gradient_clipping: bool = True,
    expert_imbalance: str = "1",
    capacity_factor: str | None = None,
) -> Training:
    """The run described by the options that say nothing of the plan."""
    from simllm.training import Training

    return Training(
        seq_len=sequence_length(seq_len, model),
        stack=stack,
        memory_headroom=fraction(headroom, "--memory-headroom"),
        optimizer=optimizer,
        flop_convention=flop_convention,
        master_weights=master_weights,
        gradient_precision=cast("Literal['fp32', 'bf16'] | None", gradient_precision),
        gradient_clipping=gradient_clipping,
        expert_imbalance="random" if expert_imbalance == "random" else _number(expert_imbalance, "--expert-imbalance"),
        capacity_factor=None if capacity_factor is None else _number(capacity_factor, "--capacity-factor"),
    )
