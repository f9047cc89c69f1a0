"""Ranks that die, hang or fail: a clear message, in time, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from simllm.models import Model
from simllm.validation.execution.case import Case
from simllm.validation.execution.matrix import STRATEGIES, matrix_case
from simllm.validation.execution.pool import ExecutionError, Pool
from simllm.validation.execution.sizes import shrink


def _case() -> Case:
    case: Case = matrix_case(shrink(Model.load("llama-3-70b").spec, layers=2), STRATEGIES["DDP 2"])
    return case


def _gone(pids: list[int]) -> bool:
    for pid in pids:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            continue
        return False
    return True


@pytest.mark.parametrize(("number", "message"), [(signal.SIGKILL, "rank 1 died"), (signal.SIGSTOP, "did not answer")])
def test_a_killed_or_hung_rank(number: signal.Signals, message: str) -> None:
    with Pool(2, timeout_s=240) as pool:
        pool.run(_case())  # both have started
        pids, folder = pool.pids, pool._folder
        pool.timeout_s = 5.0
        os.kill(pids[1], number)
        begin = time.monotonic()
        with pytest.raises(ExecutionError, match=message):
            pool.run(_case())
        assert time.monotonic() - begin < 30
        assert _gone(pids)
        assert not os.path.exists(folder)


def test_two_at_once(pool: Pool) -> None:
    """Two sets of processes on one machine know nothing of each other."""
    answers: list[object] = []
    with Pool(2, timeout_s=240) as other:
        thread = threading.Thread(target=lambda: answers.append(other.run(_case())))
        thread.start()
        here = pool.run(_case())
        thread.join()
    (there,) = answers
    assert isinstance(there, list)
    assert [record.loss for record in there] == [record.loss for record in here]


def test_more_ranks_than_processes(pool: Pool) -> None:
    case = matrix_case(shrink(Model.load("llama-3-70b").spec), {"dp": 8})
    with pytest.raises(ExecutionError, match="8 ranks"):
        pool.run(case)
