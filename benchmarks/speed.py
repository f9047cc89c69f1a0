"""Start-up and evaluation speed. Run: python benchmarks/speed.py

Whole processes are timed from outside, several times, and the median is printed with the range; machines are noisy.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

from simllm import Cluster, Model, Plan, Training, estimate


def repeat(action: Callable[[], object], times: int) -> list[float]:
    """Seconds of each of several runs, after one that does not count."""
    action()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return seconds


def show(what: str, seconds: list[float], target: str) -> None:
    """One line of the table."""
    unit, factor = ("ms", 1e3) if median(seconds) < 0.5 else ("s", 1.0)
    low, mid, high = (value * factor for value in (min(seconds), median(seconds), max(seconds)))
    print(f"{what:<52} {mid:8.3g} {unit:<2} ({low:.3g} to {high:.3g})   target {target}")


def process(*arguments: str) -> Callable[[], object]:
    """A whole Python process."""
    return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def main() -> None:
    """Time what people wait for."""
    show("python -c pass", repeat(process("-c", "pass"), 5), "-")
    show("import simllm", repeat(process("-c", "import simllm"), 5), "0.3 s")
    show("simllm models show llama-3-70b", repeat(process("-m", "simllm", "models", "show", "llama-3-70b"), 5), "0.6 s")
    question = ["--cluster", "dgx-h100", "--gpus", "512", "--global-batch-size", "1024", "--seq-len", "8192"]
    plan_command = process("-m", "simllm", "plan", "llama-3-70b", *question, "--tokens", "15T")
    show("simllm plan llama-3-70b, 512 GPUs", repeat(plan_command, 3), "3 s")

    model, cluster = Model.load("llama-3-70b"), Cluster.load("dgx-h100", 512)
    plan = Plan(tp=8, pp=4, dp=16, global_batch_size=1024, sequence_parallel=True)
    training = Training(seq_len=8192)
    show("one warm estimate", repeat(lambda: estimate(model, cluster, plan, training), 200), "5 ms")


if __name__ == "__main__":
    main()
