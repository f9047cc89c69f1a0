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
from typing import TYPE_CHECKING

import msgspec

from simllm.errors import UnsupportedError
from simllm.hardware.host import Host
from simllm.hardware.profiles import load_profile_file, profiles_dir
from simllm.hardware.stack import Fraction
from simllm.parallel.memory import StageMemory, shard_degrees
from simllm.parallel.stages import Stage, stage_weights
from simllm.training.cost import Cost
from simllm.training.exposure import exposed

if TYPE_CHECKING:
    from simllm.training.step import Step

__all__ = ["HostMemory", "HostWork", "host_memory", "host_of"]


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
    """What the ranks of the fullest node keep on their host.

    Pipeline ranks stand dp x cp x tp devices apart; a node holds neighbours.
    """
    host, plan = host_of(step), step.plan
    devices, width = HostWork(step).devices, plan.num_gpus // plan.pp
    needed = []
    for first in range(0, plan.num_gpus, devices):
        ranks = [stages[device // width].host for device in range(first, first + devices)]
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
        The profile of the system says nothing of its host, or of the drives that the plan uses.
    """
    cluster, offload = step.cluster, step.plan.offload
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

    def _own(self, stage: Stage) -> float:
        """Parameters of a stage whose states a rank owns."""
        plan, step = self.step.plan, self.step
        dense, expert = stage_weights(stage, step.layout, plan.pp)
        by_dense, by_expert = (1, 1) if plan.zero == "0" else shard_degrees(plan, step.hsdp_shard)
        return dense / by_dense + expert / by_expert

    def per_micro_batch(self, stage: Stage, forward_s: float, backward_s: float) -> tuple[Cost, Cost]:
        """Transfers of one micro-batch that show beside its forward and its backward pass."""
        offload, states, own = self.step.plan.offload, self.step.states, self._own(stage)
        ahead = behind = 0.0
        if offload.moves("activations"):
            fetch, store = self._rates("activations")
            kept = self.step.kept_bytes(stage)
            ahead, behind = ahead + kept / store, behind + kept / fetch
        if offload.moves("parameters"):
            seconds = own * states.gathered / self._rates("parameters")[0]
            ahead, behind = ahead + seconds, behind + seconds
        gradients = own * states.gradient_on_wire / self._rates("gradients")[1] if offload.moves("gradients") else 0.0
        share = offload_profile().transfer_exposed.si
        # The link runs both ways at once: gradients go out while parameters and activations come in.
        return (
            Cost(offload=exposed(ahead, forward_s, share)),
            Cost(offload=exposed(max(behind, gradients), backward_s, share)),
        )

    def per_step(self, stage: Stage, backward_s: float) -> tuple[float, float]:
        """Once a step: transfers that show, and the update on the host."""
        step, offload, states = self.step, self.step.plan.offload, self.step.states
        own, moments = self._own(stage), sum(step.owned_moments(stage))
        share = offload_profile().transfer_exposed.si
        shown = 0.0
        if not offload.moves("gradients"):
            shown += exposed(own * states.gradient_on_wire / self._rates("gradients")[1], backward_s, share)
        host = host_of(step)
        update = (own * states.host_update_traffic + 2 * moments) / (
            host.memory_bandwidth.si * offload_profile().adam_bandwidth.si / self.devices
        )
        if "optimizer" in offload.to_nvme:
            fetch, store = self._rates("optimizer")
            kept = own * states.float32_master + moments
            update = max(update, kept / fetch + kept / store)
        if not offload.moves("parameters"):
            shown += exposed(own * states.parameter / self._rates("parameters")[0], update, share)
        return shown, update
