"""Peak memory of a rank without a pipeline whose parameters FSDP2 shards, layer by layer backward.

A layer's parameters are gathered while it goes backward, and those of the next unit are on their way. Then its
gradients are copied into one buffer, in the precision that they are reduced in. That buffer stays until the next unit
is reduced; the last gradient that was copied stays while its unit is reduced, for a loop in PyTorch holds on to it.
Gloo reduces and scatters a copy of the buffer. With HSDP each unit's reduced shard stays until the end of the backward
pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from simllm.validation.execution.peak import Step, backward_steps, logits_bytes, loss_workspace
from simllm.validation.execution.rank_view import RankView
from simllm.validation.execution.weights import Unit

__all__ = ["sharded_step_peak"]


def sharded_step_peak(at: RankView, kept: Mapping[int, int], outside: float, head: float) -> float:
    """Most bytes beside the states while a micro-batch goes backward.

    Parameters
    ----------
    at : RankView
    kept : mapping of int to int
        Bytes that each layer keeps.
    outside, head : float
        Bytes that what is before the layers, and the head, keep.
    """
    return _Backward(at, kept, outside, head).run()


class _Backward:
    def __init__(self, at: RankView, kept: Mapping[int, int], outside: float, head: float) -> None:
        self.at, self.kept, self.head = at, kept, head
        self.left = outside + sum(kept.values())
        self.gradient_bytes = 2 if at.plan.precision == "bf16" else 4
        self.frees = at.plan.zero != "2"
        root = [unit for unit in at.units if unit.root]
        self.root = self._gathered(root)
        self.root_units = root
        #: Reduce-scatter input of the unit before, reduced shards that stay, gradients of what is outside the layers.
        self.before = self.stays = 0.0
        self.outer = float(sum(at.layout.weight_elements(w) for w in at.graph.head.weights) * self.gradient_bytes)
        self.peak = 0.0

    def _gathered(self, units: Iterable[Unit]) -> float:
        element = self.at.case.states.gathered
        return sum(unit.gathered(self.at.shard_ranks(unit)) for unit in units if self._sharded(unit)) * element

    def _sharded(self, unit: Unit) -> bool:
        return not unit.experts or self.at.shard_ranks(unit) > 1

    def _see(self, size: float) -> None:
        self.peak = max(self.peak, size + self.root + self.stays)

    def run(self) -> float:
        at, units = self.at, self.at.layer_units
        below = self._waiting(len(units))
        # What the last unit was received in stays until the end of the forward pass, the logits beside it.
        received = self._gathered(units[-1][-1:]) + (0.0 if self.frees else below)
        self._see(self.left + self.head + logits_bytes(at.graph.head, at.layout) + received)
        loss = loss_workspace(at.graph.head, at.layout, at.plan.tp > 1)
        self._see(self.left + self.head + loss + below)
        for k in reversed(range(len(units))):
            self._layer(k)
        self._outside()
        return self.peak

    def _waiting(self, k: int) -> float:
        """Gathered bytes of units below layer k: the next one, on its way; or, at stage 2, all of them."""
        units = self.at.layer_units
        if not self.frees:
            return self._gathered(unit for layer in units[:k] for unit in layer)
        return self._gathered(units[k - 1][:1]) if k else 0.0

    def _layer(self, k: int) -> None:
        at, (own, *experts) = self.at, self.at.layer_units[k]
        index, graph = at.layers[k]
        self.left -= self.kept[index]
        apart = [unit for unit in experts if self._sharded(unit)]
        steps = backward_steps(graph, at.layout, at.impl, self.gradient_bytes)
        of_experts = [i for i, step in enumerate(steps) if experts and any(w.is_expert for w in step.operator.weights)]
        below = self._waiting(k)
        made = {False: 0.0, True: 0.0}
        for i, step in enumerate(steps):
            there = self._gathered([own])
            if of_experts and i <= of_experts[-1]:
                there += self._gathered(apart)
            ahead = below if not (apart and self.frees and i < of_experts[0]) else 0.0
            around = self.left + there + ahead + self.outer
            one = max(step.weights, default=0.0)
            self._see(around + step.during + sum(made.values()) + one + self.before)
            made[i in of_experts] += sum(step.weights) if apart or i not in of_experts else 0.0
            if apart and i == of_experts[-1]:
                self._reduce(apart[0], self.left + self._gathered([own]) + below + self.outer + step.after, made)
        self._reduce(own, self.left + below + self.outer + _stream(steps), made)

    def _reduce(self, unit: Unit, around: float, made: dict[bool, float]) -> None:
        """Gradients are copied and freed, and the copy is reduced."""
        at = self.at
        ranks = at.shard_ranks(unit)
        copied = 4.0 * unit.gathered(ranks)
        others = made[not unit.experts]
        self._see(around + others + made[unit.experts] + copied)
        last = float(unit.parameters[-1].elements * self.gradient_bytes)
        twice = 2 if at.backend == "gloo" else 1
        self._see(around + others + last + twice * copied + copied / ranks)
        made[unit.experts] = 0.0
        self.before = copied
        if at.plan.zero == "hsdp" and not unit.experts:
            self.stays += copied / ranks

    def _outside(self) -> None:
        """The gradient of the token table is added to that of a tied head; then both are reduced."""
        tables = [p for unit in self.root_units for p in unit.parameters if p.name == "token.weight"]
        # Distributed tensors make the gradient of a table that is split by rows whole on every rank.
        made = {False: float(sum(p.elements for p in tables) * self.at.plan.tp * self.gradient_bytes), True: 0.0}
        self._see(made[False] + self.outer + self.before)
        self.root = 0.0
        made[False] += self.outer
        copied = 4.0 * sum(unit.gathered(self.at.shard_ranks(unit)) for unit in self.root_units)
        self._see(made[False] + copied)
        ranks = self.at.shard_ranks(self.root_units[0])
        self._see(copied * (2 if self.at.backend == "gloo" else 1) + copied / ranks)


def _stream(steps: list[Step]) -> float:
    return steps[-1].after
