"""The space of plans as axes: every combination of them is a plan, or falls for a reason that is counted.

Plans differ in two ways. A cell of the table `Cells` decides the price of one micro-batch on one rank: tensor, context
and expert parallelism, sequence parallelism, micro-batch, recomputation. A `Structure` decides how micro-batches and
ranks are put together: pipeline, chunks, schedule, sharding, precision. With a number of GPUs, data parallelism
follows. A new choice is a new value or a new axis here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

from simllm.errors import InputError
from simllm.hardware import Cluster
from simllm.models import Model
from simllm.models.activations import Recompute
from simllm.models.spec import MambaSpec, MoESpec
from simllm.parallel.offload import Offload
from simllm.parallel.plan import Plan, Zero, cut_inside_a_block, even_split, heads_fault, inner_degree
from simllm.parallel.schedules import SCHEDULES
from simllm.planner.constraints import Constraints
from simllm.training import Training

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CELL_AXES", "Cells", "Space", "Structure", "divisors"]

#: Larger micro-batches only add activations: matrix products are at their best long before.
_LARGEST_MICRO_BATCH = 16
#: Beyond this many context-parallel ranks a ring step has too few tokens to hide its transfer.
_LARGEST_CP = 64
_SMALLEST_SEQUENCE_PER_RANK = 512
#: Recomputation of every n-th layer: beyond these the difference is smaller than what is left to choose.
_EVERY = (8, 6, 4, 3, 2)

#: What a cell is made of, in the order of the table.
CELL_AXES = ("tp", "sequence_parallel", "cp", "cp_comm_type", "ep", "micro_batch_size", "recompute")
#: Those whose columns hold positions of values that are no numbers.
_NAMED = ("cp_comm_type", "recompute")


def divisors(number: int, at_most: int | None = None) -> list[int]:
    """All divisors of a number in rising order.

    >>> divisors(12), divisors(12, 4)
    ([1, 2, 3, 4, 6, 12], [1, 2, 3, 4])
    """
    limit = min(number, at_most or number)
    return [n for n in range(1, limit + 1) if number % n == 0]


@dataclass(frozen=True, kw_only=True)
class Structure:
    """How the ranks work together: everything of a plan that is not in its cell and not data parallelism."""

    precision: str
    pp: int
    vpp: int
    schedule: str
    uneven_layers: bool
    zero: Zero
    offload: Offload


@dataclass(frozen=True, eq=False)
class Cells:
    """The table of cells: all combinations of the axes of a cell.

    Attributes
    ----------
    values : dict of str to tuple
        Values of each axis, in the order of `CELL_AXES`.
    columns : dict of str to array
        For every cell its value (of recomputation and of the kind of context parallelism: the position of it).
    etp : array
        Expert-tensor parallelism, which follows from tp in a software stack.
    cp_a2a : array
        With two levels of context parallelism, the ranks that trade tokens for heads, which follow from tp and cp.
    fault : array of int
        Why no plan can be made of a cell: a position in ``reasons``, or -1.
    reasons : tuple of str
    """

    values: dict[str, tuple[Any, ...]]
    columns: dict[str, NDArray[np.int64]]
    etp: NDArray[np.int64]
    cp_a2a: NDArray[np.int64]
    fault: NDArray[np.int64]
    reasons: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Values on each axis; cells are numbered with the last axis running fastest."""
        return tuple(len(self.values[name]) for name in CELL_AXES)

    @property
    def count(self) -> int:
        """Number of cells."""
        return prod(self.shape)

    def fields(self, cell: int) -> dict[str, Any]:
        """The fields of a `Plan` that a cell decides."""
        fields: dict[str, Any] = {name: int(self.columns[name][cell]) for name in CELL_AXES}
        fields["sequence_parallel"] = bool(fields["sequence_parallel"])
        for name in _NAMED:
            fields[name] = self.values[name][fields[name]]
        if fields["cp"] == 1:
            fields["cp_comm_type"] = "p2p"
        return fields | {"etp": int(self.etp[cell]), "cp_a2a": int(self.cp_a2a[cell])}


class Space:
    """All plans of one model on one cluster.

    Parameters
    ----------
    model : Model
    cluster : Cluster
    training : Training
    global_batch_size : int
    constraints : Constraints
    unfused : bool
        Attention keeps its scores, so that selective recomputation has something to do.
    """

    def __init__(
        self,
        model: Model,
        cluster: Cluster,
        training: Training,
        global_batch_size: int,
        constraints: Constraints,
        unfused: bool = False,
    ) -> None:
        self.model, self.cluster, self.training = model, cluster, training
        self.global_batch_size, self.constraints, self.unfused = global_batch_size, constraints, unfused
        spec = model.spec
        blocks = dict.fromkeys((*spec.decoder.layers, *(spec.encoder.layers if spec.encoder else ())))
        self._attention = spec.attentions
        self._mamba = [b.mixer for b in blocks if isinstance(b.mixer, MambaSpec)]
        self._dense = [b.mlp for b in blocks if b.mlp is not None and not isinstance(b.mlp, MoESpec)]
        self._moe = [b.mlp for b in blocks if isinstance(b.mlp, MoESpec)]

    # -- cells -------------------------------------------------------------------------------------------------

    def _axis(self, name: str, values: list[int]) -> tuple[int, ...]:
        """The values of an axis: those that are allowed, or all that could be."""
        allowed = getattr(self.constraints, name)
        return tuple(sorted(set(allowed))) if allowed else tuple(values)

    def _tensor_degrees(self) -> tuple[int, ...]:
        cluster = self.cluster
        reach = {"node": cluster.gpus_per_node, "domain": cluster.gpus_per_domain, "cluster": cluster.num_gpus}
        limit = min(reach[self.constraints.tp_within], cluster.num_gpus)
        return tuple(tp for tp in self._axis("tp", divisors(cluster.num_gpus, limit)) if tp <= limit)

    def _policies(self) -> tuple[Recompute, ...]:
        if self.constraints.recompute:
            return self.constraints.recompute
        some = (Recompute(kind="selective"),) if self.unfused else ()
        return (Recompute(), *some, *(Recompute(kind="full", every=n) for n in _EVERY), Recompute(kind="full"))

    def cells(self) -> Cells:
        """The table of cells with the reasons why some of them cannot be."""
        import numpy as np

        gpus, wanted = self.cluster.num_gpus, self.constraints.sequence_parallel
        experts = min((moe.num_experts for moe in self._moe), default=1)
        values: dict[str, tuple[Any, ...]] = {
            "tp": self._tensor_degrees(),
            "sequence_parallel": (True, False) if wanted is None else (wanted,),
            "cp": self._axis("cp", divisors(gpus, _LARGEST_CP)),
            "cp_comm_type": tuple(dict.fromkeys(self.constraints.cp_comm_type))
            or (self.training.software.cp_comm_type,),
            "ep": self._axis("ep", divisors(experts)),
            "micro_batch_size": self._axis("micro_batch_size", divisors(self.global_batch_size, _LARGEST_MICRO_BATCH)),
            "recompute": self._policies(),
        }
        axes = [np.arange(len(v)) if name in _NAMED else np.array(v, dtype=np.int64) for name, v in values.items()]
        grid = np.meshgrid(*axes, indexing="ij")
        columns = {name: array.ravel() for name, array in zip(CELL_AXES, grid, strict=True)}
        by_tp = {tp: self.training.expert_tensor_parallel(tp) if self._moe else 1 for tp in values["tp"]}
        etp = np.array([by_tp[tp] for tp in values["tp"]], dtype=np.int64)
        etp = np.repeat(etp, len(columns["tp"]) // max(1, len(etp)))
        heads, cp_a2a = self._context_levels(columns, values["cp_comm_type"])
        fault, reasons = self._faults(columns, etp, heads)
        return Cells(values=values, columns=columns, etp=etp, cp_a2a=cp_a2a, fault=fault, reasons=reasons)

    def _context_levels(
        self, columns: dict[str, NDArray[np.int64]], kinds: tuple[str, ...]
    ) -> tuple[dict[str, NDArray[np.bool_]], NDArray[np.int64]]:
        """Cells whose context-parallel ranks cannot trade tokens for heads, by reason, and the ranks that do."""
        import numpy as np

        keys = np.stack([columns[name] for name in ("tp", "cp", "cp_comm_type")])
        cases, which = np.unique(keys, axis=1, return_inverse=True)
        cut, flat, inner = (np.zeros(cases.shape[1], dtype=np.int64) for _ in range(3))
        for number, (tp, cp, kind) in enumerate(cases.T.tolist()):
            if cp > 1 and kinds[kind] == "a2a+p2p":
                able = not any(attention.num_attention_heads % tp for attention in self._attention)
                inner[number] = inner_degree(self._attention, tp, cp, self.cluster.gpus_per_domain) if able else 0
                flat[number] = inner[number] == 0
            elif cp > 1 and kinds[kind] == "a2a":
                cut[number] = any(heads_fault(attention, tp, cp) for attention in self._attention)
        spread = which.ravel()
        reasons = {
            "cp does not divide the heads of a tensor-parallel rank (a2a)": cut[spread] > 0,
            "cp has no two levels of which one divides the heads (a2a+p2p)": flat[spread] > 0,
        }
        return reasons, inner[spread]

    def _faults(
        self, columns: dict[str, NDArray[np.int64]], etp: NDArray[np.int64], heads: dict[str, NDArray[np.bool_]]
    ) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        import numpy as np

        tp, cp, ep, split = (columns[name] for name in ("tp", "cp", "ep", "sequence_parallel"))
        seq = self.training.seq_len + self.model.graph.virtual_tokens
        found: list[tuple[str, Any]] = []
        none = np.zeros(len(tp), dtype=bool)

        def refuse(reason: str, where: Any) -> None:
            found.append((reason, none | where))

        for attention in self._attention:
            refuse("tp does not divide the attention heads", attention.num_attention_heads % tp > 0)
            if attention.latent is None:
                kv_heads = attention.num_key_value_heads
                uneven = (kv_heads % tp > 0) & (tp % kv_heads > 0)
                refuse("tp neither divides nor is a multiple of the key-value heads", uneven)
        for size in (*(mlp.intermediate_size for mlp in self._dense), *(m.inner_size for m in self._mamba)):
            refuse("tp does not divide the intermediate size", size % tp > 0)
        for moe in self._moe:
            refuse("etp does not divide the experts' intermediate size", moe.expert.intermediate_size % etp > 0)
            refuse("ep does not divide the experts", moe.num_experts % ep > 0)
        degrees, which = np.unique(np.stack([tp, etp]), axis=1, return_inverse=True)
        cut = [bool(cut_inside_a_block(self.model, *pair)) for pair in degrees.T.tolist()]
        refuse("tp cuts quantised weights inside a block", np.array(cut, dtype=bool)[which.ravel()])
        if not self._moe:
            refuse("the model has no experts to split", ep > 1)
        refuse("cp does not divide the sequence", seq % cp > 0)
        refuse(
            "tp x cp does not divide the sequence (sequence parallel)", (split > 0) & (tp > 1) & (seq % (cp * tp) > 0)
        )
        short = (cp > 1) & (self.training.seq_len // cp < _SMALLEST_SEQUENCE_PER_RANK)
        if not self.constraints.cp:
            refuse(f"cp leaves fewer than {_SMALLEST_SEQUENCE_PER_RANK} tokens of a sequence per rank", short)
        for reason, where in heads.items():
            refuse(reason, where)
        if self._mamba:
            refuse("context parallelism of a state-space mixer is not modelled", cp > 1)
        if self._moe:
            refuse("tp without sequence parallelism sends every token to the experts tp times", (split == 0) & (tp > 1))
        # Without tensor parallelism there is nothing to split: no choice, and not counted.
        absent = ((split > 0) & (tp == 1)) | ((columns["cp_comm_type"] > 0) & (cp == 1))
        reasons = tuple(dict.fromkeys(reason for reason, _ in found))
        fault = np.full(len(tp), -1, dtype=np.int64)
        for reason, where in reversed(found):
            fault[where] = reasons.index(reason)
        fault[absent] = len(reasons)
        return fault, reasons

    # -- structures --------------------------------------------------------------------------------------------

    def structures(self) -> Iterator[Structure | str]:
        """Every structure, or why the layers do not allow one."""
        layers = self.model.spec.num_hidden_layers
        for precision in self.constraints.precision:
            for pp in self._axis("pp", divisors(self.cluster.num_gpus)):
                counts = self._axis("vpp", list(range(1, max(1, layers // pp) + 1)) if pp > 1 else [1])
                # Chunks of different sizes are a choice where no chunks are equal, and where they are asked for.
                even = any(even_split(layers, pp * vpp) is not None for vpp in counts if vpp > 1)
                for vpp in counts:
                    uneven = even_split(layers, pp * vpp) is None
                    if uneven and vpp > 1 and even and not self.constraints.uneven_layers:
                        continue
                    if pp * vpp > layers:
                        yield "fewer layers than pipeline stages"
                        continue
                    for schedule in self._schedules(pp, vpp):
                        for offload, zero in product(self.constraints.offload, self._stages(pp)):
                            if offload.moves("parameters") and zero not in ("3", "hsdp"):
                                continue  # only sharded layers are fetched when they are needed
                            yield Structure(
                                precision=precision,
                                pp=pp,
                                vpp=vpp,
                                schedule=schedule,
                                uneven_layers=uneven,
                                zero=zero,
                                offload=offload,
                            )

    def _schedules(self, pp: int, vpp: int) -> list[str]:
        # The one that frameworks run without being asked comes first.
        closed = [name for name, schedule in SCHEDULES.items() if schedule.closed_form]
        ordered = sorted(closed, key=lambda name: name != "1f1b")
        allowed = [name for name in ordered if self.constraints.allows("schedule", name)]
        able = [name for name in allowed if schedule_runs(name, pp, vpp, 4 * pp)]
        # One rank has nothing to schedule.
        return able[:1] if pp == 1 else able

    def _stages(self, pp: int) -> list[Zero]:
        stages: list[Zero] = [stage for stage in ("0", "1", "2", "hsdp", "3") if self.constraints.allows("zero", stage)]
        return [stage for stage in stages if stage != "2" or pp == 1]


@lru_cache(maxsize=1 << 16)
def schedule_runs(schedule: str, pp: int, vpp: int, num_micro_batches: int) -> bool:
    """Whether a `Plan` with this schedule and number of micro-batches can be.

    >>> schedule_runs("interleaved", 4, 2, 8), schedule_runs("interleaved", 4, 2, 6)
    (True, False)
    """
    try:
        Plan(pp=pp, vpp=vpp, schedule=schedule, global_batch_size=num_micro_batches)
    except InputError:
        return False
    return True
