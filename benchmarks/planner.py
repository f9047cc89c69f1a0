"""The planner against its targets. Run: python benchmarks/planner.py

Llama-3.1-405B on 16,384 H100: how many plans a second are evaluated on one core, whether the arrays say what `estimate`
says, how long the whole command takes and in how much memory. Then, on a small question, the best plan of an exhaustive
search with `estimate`, and how long that would take on the large one.

Rates are by processor time (``time.process_time``), so that a busy machine does not count; the command is also timed by
the clock, as a person waits for it.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

from simllm import Cluster, Model, Training, estimate, plan
from simllm.planner import Constraints
from simllm.planner.prices import Prices
from simllm.planner.space import Cells, Space
from simllm.planner.survey import Survey, survey
from simllm.training.step import engine_for

CLUSTER = ["--cluster", "dgx-h100", "--gpus", "16384"]
QUESTION = ["plan", "llama-3.1-405b", *CLUSTER, "--global-batch-size", "2048", "--seq-len", "8192"]
COMMAND = """
import resource, sys, time
from simllm.cli import main
status = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.process_time(), file=sys.stderr)
"""


class Question:
    """A model on a cluster, with the prices of its blocks once they are known."""

    def __init__(self, model: str, gpus: int, batch: int, seq_len: int, constraints: Constraints) -> None:
        self.model, self.cluster = Model.load(model), Cluster.load("dgx-h100", gpus)
        self.training, self.batch, self.constraints = Training(seq_len=seq_len), batch, constraints
        self._prices: dict[str, Prices] = {}

    def prices(self, cells: Cells) -> dict[str, Prices]:
        """Made once."""
        if not self._prices:
            self._prices["bf16"] = Prices(self.model, self.cluster, self.training, cells, "bf16")
        return self._prices

    def evaluate(self) -> tuple[Survey, float]:
        """All plans, and the processor time that took."""
        started = time.process_time()
        space = Space(self.model, self.cluster, self.training, self.batch, self.constraints)
        usable = self.cluster.accelerator.memory_bytes * (1 - self.training.memory_headroom)
        found = survey(space, self.prices, usable, float("inf"))
        return found, time.process_time() - started


def rates(name: str, constraints: Constraints) -> None:
    """Plans a second, with and without pricing the blocks, and equality with the scalar engine."""
    engine_for.cache_clear()
    asked = Question("llama-3.1-405b", 16384, 2048, 8192, constraints)
    found, first = asked.evaluate()
    again = median(asked.evaluate()[1] for _ in range(5))
    print(f"{name}: {len(found):,} plans")
    print(f"  evaluated, blocks priced before    {len(found) / again:12,.0f} plans/s   target 1,000,000")
    print(f"  evaluated, blocks priced too       {len(found) / first:12,.0f} plans/s   ({first:.2f} s in all)")
    numbers = random.Random(0).sample(range(len(found)), 300)
    started, worst = time.process_time(), 0.0
    for number in numbers:
        answer = estimate(asked.model, asked.cluster, found.plan(number), asked.training)
        worst = max(
            worst,
            abs(found.time_s[number] / answer.step_time_s - 1),
            abs(found.peak_bytes[number] / answer.peak_memory_bytes - 1),
        )
    seconds = (time.process_time() - started) / len(numbers)
    print(f"  largest difference from estimate   {worst:12.1e}           target 1e-9 (time and memory of 300 plans)")
    print(f"  estimate, one plan after the other {1 / seconds:12,.0f} plans/s   {seconds * len(found):,.0f} s for all")


def command() -> None:
    """The whole command from a cold start."""
    walls, megabytes, busy = [], 0.0, []
    for _ in range(5):
        started = time.perf_counter()
        run = subprocess.run([sys.executable, "-c", COMMAND, *QUESTION], check=True, capture_output=True, text=True)
        walls.append(time.perf_counter() - started)
        megabytes, processor = map(float, run.stderr.split()[-2:])
        busy.append(processor)
    print(
        f"the command, from a cold start       {median(walls):12.2f} s         target 3 s ({median(busy):.2f} s busy)"
    )
    print(f"its memory                           {megabytes:12.0f} MB        target 2000 MB")


def exhaustive() -> None:
    """The best plan of a small question by exhaustive search with `estimate`."""
    few = Constraints(cp=(1, 2), micro_batch_size=(1, 2))
    asked = Question("llama-2-7b", 16, 64, 4096, few)
    found, _ = asked.evaluate()
    started = time.process_time()
    answers = [estimate(asked.model, asked.cluster, found.plan(n), asked.training) for n in range(len(found))]
    slow = time.process_time() - started
    best = min((a for a in answers if a.fits), key=lambda a: a.step_time_s)
    started = time.process_time()
    planned = plan(
        asked.model, asked.cluster, asked.training, global_batch_size=64, constraints=few, top=1, simulate=False
    ).plans[0]
    fast = time.process_time() - started
    same = "the same" if planned.step_time_s == best.step_time_s else "ANOTHER"
    print(f"llama-2-7b on 16 GPUs: {len(found):,} plans, estimate of every one {slow:.2f} s, plan {fast:.2f} s;")
    print(f"  {same} best step time, {best.step_time_s:.6f} s")


def main() -> None:
    """Everything."""
    rates("llama-3.1-405b on 16,384 GPUs", Constraints())
    rates("the same with uneven chunks", Constraints(uneven_layers=True))
    command()
    exhaustive()


if __name__ == "__main__":
    main()
