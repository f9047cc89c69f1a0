"""Fine-tuning on a cluster: the best plan, the batch that fits, the smallest GPU for it, methods side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

from simllm.errors import InputError
from simllm.hardware import Accelerator, Cluster, load_accelerator
from simllm.hardware.profiles import list_profiles
from simllm.kernels.profile import load_form
from simllm.models import Model
from simllm.models.activations import Recompute
from simllm.parallel.plan import Plan
from simllm.planner.search import PlanSearch, plan
from simllm.planner.space import schedule_runs
from simllm.training import Estimate, Training
from simllm.training.step import Step

__all__ = ["COMPARED", "FineTuning", "compare_methods", "finetune", "largest_batch", "smallest_gpu"]

#: The methods of a comparison: the options that their papers and peft use where nothing is said.
COMPARED: Final[tuple[tuple[str, Mapping[str, Any]], ...]] = (
    ("full", {}),
    ("galore", {"rank": 128}),
    ("freeze", {"top": 2}),
    ("bitfit", {}),
    ("houlsby", {"bottleneck": 64}),
    ("pfeiffer", {"bottleneck": 64}),
    ("prompt", {"virtual_tokens": 20}),
    ("p-tuning", {"virtual_tokens": 20, "encoder_hidden_size": 128}),
    ("prefix", {"virtual_tokens": 20}),
    ("llama-adapter", {"adapter_len": 10}),
    ("ia3", {}),
    ("vera", {"rank": 256}),
    ("adalora", {"rank": 12}),
    ("lora", {"rank": 16, "targets": ("all-linear",)}),
    ("dora", {"rank": 16, "targets": ("all-linear",)}),
    ("qlora", {"rank": 16, "targets": ("all-linear",)}),
)

#: Devices that this software runs on.
_GPU_VENDORS = frozenset({"NVIDIA", "AMD"})
#: Beyond this a batch is limited by learning, not by memory.
_LARGEST_BATCH = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class FineTuning:
    """One method on one cluster.

    Attributes
    ----------
    model : Model
        As it is fine-tuned.
    search : PlanSearch
    largest_micro_batch : int
        Sequences a GPU can hold at once with the best plan; 0: not one.
    smallest_gpu : Accelerator or None
        With the least memory in the catalog that fine-tunes one sequence at a time, everything recomputed; None: none.
    refused : str
        Why the method does not go with the model; "" where it does.
    """

    model: Model
    search: PlanSearch | None
    largest_micro_batch: int = 0
    smallest_gpu: Accelerator | None = None
    refused: str = ""

    @property
    def fits(self) -> bool:
        """Whether a plan fits."""
        return self.search is not None and bool(self.search.plans)

    @property
    def best(self) -> Estimate | None:
        """The best plan, or the one nearest to fitting."""
        if self.search is None:
            return None
        return self.search.plans[0] if self.search.plans else self.search.nearest

    def to_dict(self) -> dict[str, Any]:
        """Plain data: counts, and the keys of the best plan's estimate."""
        method = self.model.method
        document: dict[str, Any] = {
            "model": self.model.name,
            "method": method.name if method else "full",
            "trainable_parameters": self.model.trainable_parameters,
            "total_parameters": self.model.parameters.total,
            "trainable_fraction": self.model.trainable_parameters / self.model.parameters.total,
        }
        if self.best is not None:
            document |= self.best.to_dict()
            document["largest_micro_batch_size"] = self.largest_micro_batch
            document["smallest_gpu"] = self.smallest_gpu.name if self.smallest_gpu else None
        return document


def finetune(
    model: Model,
    cluster: Cluster,
    training: Training,
    *,
    global_batch_size: int = 16,
    precision: str = "bf16",
    progress: Callable[[int], None] | None = None,
) -> FineTuning:
    """The best plan to fine-tune a model, whatever the method.

    Parameters
    ----------
    model : Model
        With its method: ``Model.load(...).finetuned("lora")``.
    cluster : Cluster
    training : Training
    global_batch_size : int
        Sequences per optimizer step.
    precision : str
    progress : callable, optional

    Returns
    -------
    FineTuning

    Examples
    --------
    >>> from simllm import Cluster, Model, Training
    >>> tuned = Model.load("llama-2-7b").finetuned("qlora", rank=16)
    >>> answer = finetune(tuned, Cluster.load("tinybox-green", 1), Training(seq_len=1024, stack="hf-peft"))
    >>> answer.fits, answer.best.plan.global_batch_size
    (True, 16)
    """
    search = plan(
        model, cluster, training, global_batch_size=global_batch_size, precision=precision, top=1, progress=progress
    )
    best = search.plans[0].plan if search.plans else None
    return FineTuning(
        model=model,
        search=search,
        largest_micro_batch=0 if best is None else largest_batch(model, cluster, best, training),
        smallest_gpu=smallest_gpu(model, cluster, training, precision),
    )


def largest_batch(model: Model, cluster: Cluster, best: Plan, training: Training) -> int:
    """The largest micro-batch that fits with the degrees and the recomputation of a plan."""
    usable = cluster.accelerator.memory_bytes * (1 - training.memory_headroom)

    fewest = next(m for m in (1, best.pp) if schedule_runs(best.schedule, best.pp, best.vpp, m))

    def fits(size: int) -> bool:
        batch = size * best.dp * fewest
        bigger = replace(best, micro_batch_size=size, global_batch_size=batch)
        return Step(model, cluster, bigger, training).first_overflow(usable) is None

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= _LARGEST_BATCH and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@cache
def _accelerators() -> tuple[Accelerator, ...]:
    """The catalog's devices, the smallest memory first, of equal ones the slowest."""
    cards = (load_accelerator(name) for name in list_profiles("accelerators"))
    return tuple(sorted(cards, key=lambda card: (card.memory_bytes, max(card.peak_flops.values()))))


def smallest_gpu(model: Model, cluster: Cluster, training: Training, precision: str = "bf16") -> Accelerator | None:
    """The device with the least memory that fine-tunes one sequence at a time with full recomputation."""
    single = Plan(zero="0", recompute=Recompute(kind="full"), precision=precision)
    (memory,) = Step(model, cluster, single, training).memory()
    room, peak = 1 - training.memory_headroom, load_form().precisions[precision].peak
    able = (card for card in _accelerators() if peak in card.peak_flops and card.vendor in _GPU_VENDORS)
    return next((card for card in able if memory.peak_bytes <= card.memory_bytes * room), None)


def compare_methods(
    model: Model,
    cluster: Cluster,
    training: Training,
    *,
    methods: Sequence[tuple[str, Mapping[str, Any]]] = COMPARED,
    global_batch_size: int = 16,
    precision: str = "bf16",
    progress: Callable[[int], None] | None = None,
) -> tuple[tuple[str, FineTuning], ...]:
    """Every method on the same model and cluster, in the order of `COMPARED`.

    A method that does not go with the model has a reason instead of an answer.
    """
    answers = []
    for name, options in methods:
        try:
            tuned = model.finetuned(name, **options)
        except InputError as error:
            answers.append((name, FineTuning(model=model, search=None, refused=str(error))))
            continue
        answers.append(
            (
                name,
                finetune(
                    tuned,
                    cluster,
                    training,
                    global_batch_size=global_batch_size,
                    precision=precision,
                    progress=progress,
                ),
            )
        )
    return tuple(answers)
