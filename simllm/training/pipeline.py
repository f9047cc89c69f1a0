"""The pipeline of a step, run event by event: the times of the model's stages put into the schedule's action table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from simllm.parallel.memory import weight_gradient_bytes
from simllm.parallel.schedules import (
    Pair,
    StageTimes,
    Table,
    Timeline,
    schedule_actions,
    searched_zero_bubble,
    simulate,
    simulated_time,
    stage_of,
)
from simllm.parallel.stages import Stage, pipeline_stages

if TYPE_CHECKING:
    from simllm.training.step import StageTime, Step

__all__ = ["PipelineRun"]


@dataclass(frozen=True, eq=False)
class PipelineRun:
    """One step of a plan through its action table.

    Attributes
    ----------
    step : Step
    """

    step: Step

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the model in model order, every chunk by itself."""
        plan = self.step.plan
        return pipeline_stages(self.step.graph, plan.pp * plan.vpp, 1, plan.uneven_layers)

    @cached_property
    def _costs(self) -> list[StageTime]:
        return self.step.stage_times(self.stages)

    @cached_property
    def times(self) -> StageTimes:
        """Seconds of a micro-batch on every stage.

        The part of a transfer that shows occupies the rank that waits for it, the rest runs beside other work and only
        delays the next stage.
        """
        transfer, visible = self.step.transfer_s
        home = self._home
        last = len(home) - 1
        occupied = transfer * visible
        forward, ahead, behind = [], [], []
        for stage, cost in enumerate(self._costs):
            forward.append(cost.forward.total + (occupied if stage and home[stage - 1] != home[stage] else 0.0))
            returned = occupied if stage < last and home[stage + 1] != home[stage] else 0.0
            ahead.append(cost.backward.total - cost.weight_s + returned)
            behind.append(cost.weight_s)
        return StageTimes(
            forward=forward,
            input_gradient=ahead,
            weight_gradient=behind,
            pair=self._pairs(forward, [i + w for i, w in zip(ahead, behind, strict=True)]),
            lag=transfer - occupied,
        )

    @cached_property
    def _home(self) -> list[int]:
        """The rank of every stage; with two copies of the model that of the first."""
        plan = self.step.plan
        home = {stage_of(plan.pipeline.placement, plan.pp, r, c): r for c in range(plan.vpp) for r in range(plan.pp)}
        return [home[stage] for stage in range(len(home))]

    def _pairs(self, forward: list[float], backward: list[float]) -> list[tuple[float, float]] | None:
        """Forward and backward side by side: the communication of experts and of the pipeline hides behind the rest."""
        plan = self.step.plan
        if not plan.pipeline.pairs:
            return None

        def beside(ahead: int, behind: int) -> float:
            together = forward[ahead] + backward[behind]
            compute = together - self._hideable(ahead, True) - self._hideable(behind, False)
            return max(compute, together - compute)

        placement = plan.pipeline.placement
        own = [tuple(stage_of(placement, plan.pp, rank, chunk) for chunk in (0, 1)) for rank in range(plan.pp)]
        return [(beside(a, b), beside(b, a)) for a, b in own]

    def _hideable(self, stage: int, ahead: bool) -> float:
        cost, (transfer, visible), home = self._costs[stage], self.step.transfer_s, self._home
        near = stage - 1 if ahead else stage + 1
        travels = 0 <= near < len(home) and home[near] != home[stage]
        return (cost.forward if ahead else cost.backward).expert_parallel + (transfer * visible if travels else 0.0)

    @cached_property
    def table(self) -> Table:
        """The schedule's actions."""
        plan = self.step.plan
        if plan.pipeline.rows is not None:
            return schedule_actions(plan.schedule, plan.pp, plan.num_micro_batches, plan.vpp)
        times = self.times
        kept = [self.step.kept_bytes(stage) for stage in self.stages]
        # A stage in front of the first trained weight keeps nothing.
        pending = max(
            (
                weight_gradient_bytes(stage, self.step.layout, self.step.engine.impl) / size
                for stage, size in zip(self.stages, kept, strict=True)
                if size
            ),
            default=0.0,
        )
        return searched_zero_bubble(
            plan.num_micro_batches,
            plan.pipeline.limit * plan.pp,
            pending,
            tuple(times.forward),
            tuple(times.input_gradient),
            tuple(times.weight_gradient),
            times.lag,
        )

    @cached_property
    def total_s(self) -> float:
        """Seconds from one step to the next, without what happens once per step."""
        return simulated_time(self.table, self.times, self.step.plan.pipeline.synchronised)

    def hidden_s(self, rank: int) -> float:
        """Seconds that a rank saves by running forwards beside backwards."""
        plan, times = self.step.plan, self.times
        if times.pair is None:
            return 0.0
        backward = [i + w for i, w in zip(times.input_gradient, times.weight_gradient, strict=True)]
        saved = 0.0
        for item in self.table.rows[rank]:
            if isinstance(item, Pair):
                ahead, behind = (
                    stage_of(plan.pipeline.placement, plan.pp, rank, action.chunk)
                    for action in (item.forward, item.backward)
                )
                saved += times.forward[ahead] + backward[behind] - times.pair[rank][item.forward.chunk]
        return saved

    def timeline(self) -> Timeline:
        """When every action runs."""
        return simulate(self.table, self.times)
