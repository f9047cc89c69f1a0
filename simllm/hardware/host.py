"""The host of a node: memory, the links to its devices, drives. What offloading needs to know."""

from __future__ import annotations

import msgspec

from simllm.hardware.figures import Bytes, BytesPerSecond

__all__ = ["Host"]


class Host(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One node's host; bandwidths are per direction.

    Attributes
    ----------
    memory : Bytes
        Of the node.
    memory_bandwidth : BytesPerSecond
        Peak of all memory channels of the node.
    link_bandwidth : BytesPerSecond
        One device and host memory with nothing beside it.
    node_link_bandwidth : BytesPerSecond
        All devices of the node and host memory at once.
    nvme : Bytes, optional
        Drives of the node.
    nvme_read, nvme_write : BytesPerSecond, optional
        All drives of the node together.
    """

    memory: Bytes
    memory_bandwidth: BytesPerSecond
    link_bandwidth: BytesPerSecond
    node_link_bandwidth: BytesPerSecond
    nvme: Bytes | None = None
    nvme_read: BytesPerSecond | None = None
    nvme_write: BytesPerSecond | None = None

    def __post_init__(self) -> None:
        if len({figure is None for figure in (self.nvme, self.nvme_read, self.nvme_write)}) > 1:
            raise ValueError("nvme, nvme_read and nvme_write belong together: give all three or none")

    @property
    def drives(self) -> tuple[float, float]:
        """Bytes/s read from and written to all drives; nothing where there are none."""
        if self.nvme_read is None or self.nvme_write is None:
            return 0.0, 0.0
        return self.nvme_read.si, self.nvme_write.si

    def link_of(self, devices: int) -> float:
        """Bytes/s of one device and host memory when so many devices of the node use their links at once."""
        return min(self.link_bandwidth.si, self.node_link_bandwidth.si / devices)
