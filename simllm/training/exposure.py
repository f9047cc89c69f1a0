"""What of a transfer shows beside computation."""

from __future__ import annotations

__all__ = ["exposed"]


def exposed(communication_s: float, window_s: float, share: float) -> float:
    """Communication that shows beside a window of computation.

    What does not fit into the window shows, and of the rest the share that the software leaves visible.

    >>> exposed(3.0, 2.0, 0.5), exposed(1.0, 2.0, 0.0), exposed(1.0, 2.0, 1.0)
    (2.0, 0.0, 1.0)
    """
    return max(0.0, communication_s - window_s) + share * min(communication_s, window_s)
