"""The time that offloading takes: transfers over the host link beside the passes, and the update on the host.

Each device moves its own share of the states (the bandwidth-centric partitioning of ZeRO-Infinity, arXiv:2104.07857,
section 6.1), at the rate that all devices of its node get at once. Gradients leave beside the backward pass, new
parameters return beside the update (ZeRO-Offload, arXiv:2101.06840, section 4). With drives the slower of update and
reading and writing them counts, as those run beside each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import inf
from typing import TYPE_CHECKING

import msgspec

from simllm.elementwise import Real, larger
from simllm.errors import UnsupportedError
from simllm.hardware.host import Host
from simllm.hardware.profiles import load_profile_file, profiles_dir
from simllm.hardware.stack import Fraction
from simllm.parallel.memory import StageMemory, shard_degrees
from simllm.parallel.stages import Stage, stage_frozen_bytes, stage_weights
from simllm.training.cost import Cost
from simllm.training.exposure import exposed

if TYPE_CHECKING:
    from simllm.training.step import Step

__all__ = ["HostMemory", "HostWork", "beside_passes", "host_memory", "host_of", "node_stages", "offload_profile"]


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """What a node keeps of its devices' states, against what it has.

    Attributes
    ----------
    memory_bytes, nvme_bytes : float
        Needed by the fullest node.
    memory_capacity_bytes, nvme_capacity_bytes : float
        Of a node; of drives 0 where it has none.
    """

    memory_bytes: float
    memory_capacity_bytes: float
    nvme_bytes: float
    nvme_capacity_bytes: float

    @property
    def fits(self) -> bool:
        """Whether the node holds it."""
        return self.memory_bytes <= self.memory_capacity_bytes and self.nvme_bytes <= self.nvme_capacity_bytes

    def to_dict(self) -> dict[str, float | bool]:
        """Plain data with stable keys."""
        return asdict(self) | {"fits": self.fits}


def host_memory(step: Step, stages: Sequence[StageMemory]) -> HostMemory:
    """What the ranks of the fullest node keep on their host."""
    host, plan = host_of(step), step.plan
    needed = []
    for node in node_stages(plan.num_gpus, plan.pp, HostWork(step).devices):
        ranks = [stages[rank].host for rank in node]
        drives = sum(size for kept in ranks for name, size in kept.items() if name.endswith(":nvme"))
        needed.append((sum(sum(kept.values()) for kept in ranks) - drives, drives))
    return HostMemory(
        memory_bytes=max(memory for memory, _ in needed),
        memory_capacity_bytes=host.memory.si,
        nvme_bytes=max(drives for _, drives in needed),
        nvme_capacity_bytes=host.nvme.si if host.nvme else 0.0,
    )


class OffloadProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How well hosts and links are used; hardware_profiles/offload.yaml."""

    adam_bandwidth: Fraction
    transfer_exposed: Fraction


@lru_cache(maxsize=1)
def offload_profile() -> OffloadProfile:
    """The figures of offloading that hold for every system."""
    return load_profile_file(profiles_dir() / "offload.yaml", OffloadProfile)


def host_of(step: Step) -> Host:
    """The host of a step's nodes.

    Raises
    ------
    UnsupportedError
        The profile of the system says nothing of its host, or of the drives that the plan uses; or the optimizer is to
        be offloaded and keeps its moments in pages or of projections.
    """
    cluster, offload = step.cluster, step.plan.offload
    if offload.moves("optimizer"):
        weights = (weight for part, _ in step.graph.parts for weight in part.weights if weight.trained)
        if any(weight.paged or weight.moment_rank for weight in weights):
            raise UnsupportedError(
                f"offload={offload}: an optimizer with paged states or projected gradients updates on the device; "
                "leave the optimizer there"
            )
    if cluster.host is None:
        raise UnsupportedError(
            f"offload={offload}: the profile of {cluster.name} has no host section (memory, memory_bandwidth, "
            "link_bandwidth, node_link_bandwidth); copy it to a YAML file of your own and add one"
        )
    if offload.to_nvme and cluster.host.nvme is None:
        raise UnsupportedError(f"offload={offload}: the profile of {cluster.name} states no NVMe drives; use cpu")
    return cluster.host


@dataclass(frozen=True, eq=False)
class HostWork:
    """What offloading adds to a step.

    Attributes
    ----------
    step : Step
    """

    step: Step

    @property
    def devices(self) -> int:
        """Devices of a node that work at once."""
        return min(self.step.cluster.num_gpus, self.step.cluster.gpus_per_node)

    def _rates(self, what: str) -> tuple[float, float]:
        """Bytes/s of one device from the place of something, and to it."""
        host = host_of(self.step)
        link = host.link_of(self.devices)
        if what not in self.step.plan.offload.to_nvme:
            return link, link
        read, write = host.drives
        return min(link, read / self.devices), min(link, write / self.devices)

    def _share(self, dense: float, expert: float) -> float:
        """What a rank owns of dense and expert parameters."""
        by_dense, by_expert = (
            (1, 1) if self.step.plan.zero == "0" else shard_degrees(self.step.plan, self.step.hsdp_shard)
        )
        return dense / by_dense + expert / by_expert

    def _own(self, stage: Stage) -> float:
        """Trained parameters of a stage whose states a rank owns."""
        return self._share(*stage_weights(stage, self.step.layout, self.step.plan.pp))

    def _frozen_bytes(self, stage: Stage) -> float:
        """Bytes of the frozen weights of a stage that a rank owns."""
        step = self.step
        return self._share(*stage_frozen_bytes(stage, step.layout, step.plan.pp, step.states.gathered))

    def states_traffic_s(self, stage: Stage) -> tuple[float, float]:
        """Seconds of a micro-batch's states over the link: parameters for a pass, gradients after it."""
        offload, states, own = self.step.plan.offload, self.step.states, self._own(stage)
        parameters = 0.0
        if offload.moves("parameters"):
            parameters = (own * states.gathered + self._frozen_bytes(stage)) / self._rates("parameters")[0]
        gradients = own * states.gradient_on_wire / self._rates("gradients")[1] if offload.moves("gradients") else 0.0
        return parameters, gradients

    def activation_rates(self) -> tuple[float, float]:
        """Bytes/s at which activations return and leave; infinite where they stay."""
        return self._rates("activations") if self.step.plan.offload.moves("activations") else (inf, inf)

    def per_micro_batch(self, stage: Stage, forward_s: float, backward_s: float) -> tuple[Cost, Cost]:
        """Transfers of one micro-batch that show beside its forward and its backward pass."""
        ahead, behind = beside_passes(
            self.states_traffic_s(stage), self.activation_rates(), self.step.kept_bytes(stage), forward_s, backward_s
        )
        return Cost(offload=ahead), Cost(offload=behind)

    def once_s(self, stage: Stage) -> tuple[float, float, float]:
        """Once a step: seconds of gradients that leave, of parameters that show as they return, and of the update."""
        step, offload, states = self.step, self.step.plan.offload, self.step.states
        own, moments = self._own(stage), sum(step.owned_moments(stage))
        leaving = 0.0 if offload.moves("gradients") else own * states.gradient_on_wire / self._rates("gradients")[1]
        update = (own * states.host_update_traffic + 2 * moments) / self._update_rate
        if "optimizer" in offload.to_nvme:
            fetch, store = self._rates("optimizer")
            kept = own * states.float32_master + moments
            update = max(update, kept / fetch + kept / store)
        returning = 0.0
        if not offload.moves("parameters"):
            seconds = own * states.parameter / self._rates("parameters")[0]
            returning = exposed(seconds, update, offload_profile().transfer_exposed.si)
        return leaving, returning, update

    @property
    def _update_rate(self) -> float:
        """Bytes/s of the host's memory that one device's share of the update gets."""
        return host_of(self.step).memory_bandwidth.si * offload_profile().adam_bandwidth.si / self.devices

    def scaling_s(self, stage: Stage) -> float:
        """Seconds to scale the gradients of a rank where they are: each is read and written."""
        return 2 * self._own(stage) * self.step.states.gradient_on_wire / self._update_rate

    def per_step(self, stage: Stage, backward_s: float) -> tuple[float, float]:
        """Once a step: transfers that show, and the update on the host."""
        leaving, returning, update = self.once_s(stage)
        return exposed(leaving, backward_s, offload_profile().transfer_exposed.si) + returning, update


def beside_passes(
    states_s: tuple[Real, Real], rates: tuple[float, float], kept_bytes: Real, forward_s: Real, backward_s: Real
) -> tuple[Real, Real]:
    """What shows of a micro-batch's transfers beside its forward and its backward pass.

    The link runs both ways at once: gradients go out while parameters and activations come in.

    Parameters
    ----------
    states_s : (parameters, gradients)
        Seconds of `HostWork.states_traffic_s`.
    rates : (fetch, store)
        Of activations, bytes/s.
    kept_bytes : float
        Activations of the micro-batch.
    forward_s, backward_s : float
    """
    (parameters, gradients), (fetch, store) = states_s, rates
    share = offload_profile().transfer_exposed.si
    ahead = exposed(parameters + kept_bytes / store, forward_s, share)
    return ahead, exposed(larger(parameters + kept_bytes / fetch, gradients), backward_s, share)


def node_stages(num_gpus: int, pp: int, devices: int) -> tuple[tuple[int, ...], ...]:
    """The distinct nodes of a cluster by the pipeline ranks of their devices.

    Pipeline ranks stand dp x cp x tp devices apart; a node holds neighbours.

    >>> node_stages(16, 4, 8), node_stages(16, 1, 8)
    (((0, 0, 0, 0, 1, 1, 1, 1), (2, 2, 2, 2, 3, 3, 3, 3)), ((0, 0, 0, 0, 0, 0, 0, 0),))
    """
    width = num_gpus // pp
    nodes = (
        tuple(device // width for device in range(first, first + devices)) for first in range(0, num_gpus, devices)
    )
    return tuple(dict.fromkeys(nodes))
