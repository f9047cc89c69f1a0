"""What of a transfer shows beside computation."""

from __future__ import annotations

from simllm.elementwise import Real, larger, smaller

__all__ = ["exposed"]


def exposed(communication_s: Real, window_s: Real, share: float) -> Real:
    """Communication that shows beside a window of computation, of one plan or of many.

    What does not fit into the window shows, and of the rest the share that the software leaves visible.

    >>> exposed(3.0, 2.0, 0.5), exposed(1.0, 2.0, 0.0), exposed(1.0, 2.0, 1.0)
    (2.0, 0.0, 1.0)
    """
    return larger(0.0, communication_s - window_s) + share * smaller(communication_s, window_s)
