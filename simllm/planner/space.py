"""The space of plans: every combination of degrees, micro-batch, recomputation and sharding worth pricing.

Combinations that cannot run are not silently left out: each is counted under the reason it falls for, at the moment it
is clear that it does, so one count may stand for a whole branch of the space.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from simllm.hardware import Cluster
from simllm.models import Model
from simllm.models.activations import Recompute
from simllm.models.spec import AttentionSpec, MambaSpec, MoESpec
from simllm.parallel.plan import Plan, Zero, cut_inside_a_block, even_split
from simllm.training import Training

__all__ = ["Branch", "Space", "divisors"]

#: Larger micro-batches only add activations: matrix products are at their best long before.
_LARGEST_MICRO_BATCH = 16
#: Beyond this many context-parallel ranks a ring step has too few tokens to hide its transfer.
_LARGEST_CP = 64
_SMALLEST_SEQUENCE_PER_RANK = 512


def divisors(number: int, at_most: int | None = None) -> list[int]:
    """All divisors of a number in rising order.

    >>> divisors(12), divisors(12, 4)
    ([1, 2, 3, 4, 6, 12], [1, 2, 3, 4])
    """
    limit = min(number, at_most or number)
    return [n for n in range(1, limit + 1) if number % n == 0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """Plans that differ only in sharding and recomputation."""

    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int
    dp: int
    micro_batch_size: int


@dataclass
class Space:
    """Enumerates plans of one model on one cluster, counting what cannot run.

    Attributes
    ----------
    rejected : Counter
        Reason -> combinations that fell for it.
    """

    model: Model
    cluster: Cluster
    training: Training
    global_batch_size: int
    precision: str
    rejected: Counter[str] = field(default_factory=Counter)
    no_recompute: Recompute = field(default_factory=Recompute)

    def __post_init__(self) -> None:
        spec = self.model.spec
        blocks = dict.fromkeys((*spec.decoder.layers, *(spec.encoder.layers if spec.encoder else ())))
        self._seq_len = self.training.seq_len + self.model.graph.virtual_tokens
        self._attention = [b.mixer for b in blocks if isinstance(b.mixer, AttentionSpec)]
        self._mamba = [b.mixer for b in blocks if isinstance(b.mixer, MambaSpec)]
        self._dense = [b.mlp for b in blocks if b.mlp is not None and not isinstance(b.mlp, MoESpec)]
        self._moe = [b.mlp for b in blocks if isinstance(b.mlp, MoESpec)]

    # -- degrees -----------------------------------------------------------------------------------------------

    def _tensor_degrees(self) -> Iterator[int]:
        for tp in divisors(self.cluster.num_gpus, self.cluster.gpus_per_domain):
            if any(a.num_attention_heads % tp for a in self._attention):
                self.rejected["tp does not divide the attention heads"] += 1
            elif any(
                a.latent is None and a.num_key_value_heads % tp and tp % a.num_key_value_heads for a in self._attention
            ):
                self.rejected["tp neither divides nor is a multiple of the key-value heads"] += 1
            elif any(mlp.intermediate_size % tp for mlp in self._dense) or any(m.inner_size % tp for m in self._mamba):
                self.rejected["tp does not divide the intermediate size"] += 1
            elif tp > 1 and self._seq_len % tp:
                self.rejected["tp does not divide the sequence (sequence parallel)"] += 1
            elif tp > 1 and cut_inside_a_block(self.model, tp):
                self.rejected["tp cuts quantised weights inside a block"] += 1
            else:
                yield tp

    def _chunks_fit(self, chunks: int) -> bool:
        return even_split(self.model.spec.num_hidden_layers, chunks) is not None

    def _context_degrees(self, tp: int, ranks: int) -> Iterator[int]:
        for cp in divisors(ranks, _LARGEST_CP):
            if self._seq_len % (cp * tp):
                self.rejected["cp does not divide the sequence"] += 1
            elif cp > 1 and self.training.seq_len // cp < _SMALLEST_SEQUENCE_PER_RANK:
                self.rejected[f"cp leaves fewer than {_SMALLEST_SEQUENCE_PER_RANK} tokens of a sequence per rank"] += 1
            elif cp > 1 and self._mamba:
                self.rejected["context parallelism of a state-space mixer is not modelled"] += 1
            else:
                yield cp

    def _expert_degrees(self, tp: int, ranks: int) -> Iterator[int]:
        if not self._moe:
            yield 1
            return
        etp = self.training.expert_tensor_parallel(tp)
        if any(moe.expert.intermediate_size % etp for moe in self._moe):
            self.rejected["etp does not divide the experts' intermediate size"] += 1
            return
        for ep in divisors(min(moe.num_experts for moe in self._moe)):
            if ranks % (ep * etp) or any(moe.num_experts % ep for moe in self._moe):
                self.rejected["ep does not divide the ranks of a stage"] += 1
            else:
                yield ep

    def _chunk_counts(self, pp: int, micro_batches: int) -> Iterator[int]:
        yield 1
        if pp == 1:
            return
        for vpp in range(2, self.model.spec.num_hidden_layers // pp + 1):
            if not self._chunks_fit(pp * vpp):
                continue  # not a choice that anyone would make by hand: only even splits are plans
            if micro_batches % pp:
                self.rejected["interleaving needs pp to divide the micro-batches"] += 1
            else:
                yield vpp

    def branches(self) -> Iterator[Branch]:
        """Every combination of degrees and micro-batch that can run."""
        gpus, batch = self.cluster.num_gpus, self.global_batch_size
        for tp in self._tensor_degrees():
            for pp in divisors(gpus // tp):
                if not self._chunks_fit(pp):
                    self.rejected["the layers do not split into pp stages"] += 1
                    continue
                for cp in self._context_degrees(tp, gpus // tp // pp):
                    dp = gpus // tp // pp // cp
                    if batch % dp:
                        self.rejected["dp does not divide the global batch"] += 1
                        continue
                    for ep in self._expert_degrees(tp, tp * cp * dp):
                        yield from self._batches(tp, pp, cp, ep, dp)

    def _batches(self, tp: int, pp: int, cp: int, ep: int, dp: int) -> Iterator[Branch]:
        share = self.global_batch_size // dp
        for micro_batch_size in divisors(share, _LARGEST_MICRO_BATCH):
            for vpp in self._chunk_counts(pp, share // micro_batch_size):
                yield Branch(tp=tp, pp=pp, vpp=vpp, cp=cp, ep=ep, dp=dp, micro_batch_size=micro_batch_size)

    # -- what differs inside a branch ----------------------------------------------------------------------------

    def sharding(self, branch: Branch) -> tuple[Zero, ...]:
        """ZeRO stages that make a difference, the one that communicates least first."""
        ranks = branch.dp * branch.cp
        if ranks == 1:
            return ("0",)
        inside = max(1, self.cluster.gpus_per_domain // branch.tp)
        stages: list[Zero] = ["0", "1"]
        if branch.pp == 1:
            stages.append("2")
        if 1 < inside < ranks and ranks % inside == 0:
            stages.append("hsdp")
        return (*stages, "3")

    def recomputation(self, unfused: bool) -> tuple[Recompute, ...]:
        """Policies, the one that computes least first; a fused attention kernel has nothing selective to do."""
        kinds = ("none", "selective", "full") if unfused else ("none", "full")
        return tuple(Recompute(kind=kind) for kind in kinds)

    def plan(self, branch: Branch, zero: Zero, recompute: Recompute) -> Plan:
        """The plan of a branch with its sharding and recomputation."""
        return Plan(
            tp=branch.tp,
            pp=branch.pp,
            vpp=branch.vpp,
            cp=branch.cp,
            ep=branch.ep,
            etp=self.training.expert_tensor_parallel(branch.tp) if self._moe else 1,
            dp=branch.dp,
            zero=zero,
            sequence_parallel=branch.tp > 1,
            micro_batch_size=branch.micro_batch_size,
            global_batch_size=self.global_batch_size,
            recompute=recompute,
            precision=self.precision,
            schedule="interleaved" if branch.vpp > 1 else "1f1b",
        )
