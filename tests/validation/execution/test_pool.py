"""Ranks that die, hang or fail: a clear message, in time, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

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


def test_a_rank_that_is_dead_before_it_is_asked() -> None:
    with Pool(2, timeout_s=60) as pool:
        os.kill(pool.pids[1], signal.SIGKILL)
        pool._processes[1].join(10)
        with pytest.raises(ExecutionError, match="rank 1 died"):
            pool.run(_case())


_PARENT = """
import time
from simllm.models import Model
from simllm.validation.execution.matrix import STRATEGIES, matrix_case
from simllm.validation.execution.pool import Pool
from simllm.validation.execution.sizes import shrink

if __name__ == "__main__":
    pool = Pool(1)
    pool.run(matrix_case(shrink(Model.load("llama-3-70b").spec, layers=1), STRATEGIES["one rank"]))
    print(pool._folder, *pool.pids, flush=True)
    time.sleep(60)
"""


def test_nothing_is_left_of_a_parent_that_was_ended(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(_PARENT)
    with subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        folder, *words = parent.stdout.readline().split()
        assert os.path.exists(folder)
        parent.send_signal(signal.SIGTERM)
    pids = [int(word) for word in words]
    end = time.monotonic() + 30
    while time.monotonic() < end and (os.path.exists(folder) or not _gone(pids)):
        time.sleep(0.2)
    assert not os.path.exists(folder)
    assert _gone(pids)


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
