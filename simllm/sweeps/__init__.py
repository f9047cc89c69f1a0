"""Many questions at once: axes to cells, cells to rows, rows to one table, by one process or many."""

from simllm.sweeps.cells import Sweep, read_sweep
from simllm.sweeps.run import InterruptedSweepError, sweep
from simllm.sweeps.workers import WorkerLostError

__all__ = ["InterruptedSweepError", "Sweep", "WorkerLostError", "read_sweep", "sweep"]
