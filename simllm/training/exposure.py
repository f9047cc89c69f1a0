"""What of a transfer, and of launching kernels, shows beside computation."""

from __future__ import annotations

from simllm.elementwise import Real, larger, smaller

__all__ = ["exposed", "launch_s"]


def exposed(communication_s: Real, window_s: Real, share: float) -> Real:
    """Communication that shows beside a window of computation, of one plan or of many.

    What does not fit into the window shows, and of the rest the share that the software leaves visible.

    >>> exposed(3.0, 2.0, 0.5), exposed(1.0, 2.0, 0.0), exposed(1.0, 2.0, 1.0)
    (2.0, 0.0, 1.0)
    """
    return larger(0.0, communication_s - window_s) + share * smaller(communication_s, window_s)


def launch_s(host_s: float, device_s: float, join: float) -> float:
    """Seconds that launching kernels adds to running them.

    Long kernels hide the launches behind them, short ones wait for theirs: the two times join by a norm, between their
    sum (``join`` 1) and the longer of both (``join`` large).

    >>> launch_s(3.0, 4.0, 1), launch_s(3.0, 4.0, 2), launch_s(0.0, 4.0, 4), launch_s(1.0, 0.0, 4)
    (3.0, 1.0, 0.0, 1.0)
    """
    longer = max(host_s, device_s)
    if longer <= 0.0:
        return 0.0
    joined: float = longer * ((host_s / longer) ** join + (device_s / longer) ** join) ** (1.0 / join)
    return joined - device_s
