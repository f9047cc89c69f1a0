"""Time of a kernel that only moves bytes: elementwise operators, norms, softmax, optimizer updates, copies."""

from __future__ import annotations

__all__ = ["memory_bound_time"]


def memory_bound_time(size_bytes: float, bandwidth: float, efficiency: float, launch_s: float) -> float:
    """Seconds to stream ``size_bytes`` through memory: ``launch_s + size_bytes / (efficiency * bandwidth)``.

    Parameters
    ----------
    size_bytes : float
        Bytes read plus bytes written.
    bandwidth : float
        Memory bandwidth, bytes/s.
    efficiency : float
        Share of it that streaming kernels reach.
    launch_s : float
        Shortest time of a kernel.

    Examples
    --------
    >>> memory_bound_time(1.6e9, 2e12, 0.8, 5e-6)
    0.001005
    >>> memory_bound_time(0, 2e12, 0.8, 5e-6)
    0.0
    """
    return launch_s + size_bytes / (efficiency * bandwidth) if size_bytes > 0 else 0.0
