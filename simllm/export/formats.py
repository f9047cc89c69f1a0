"""The frameworks by name, and whose file a file is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from simllm.errors import InputError, unknown_name
from simllm.export import accelerate, deepspeed, megatron, megatron_reading, torchtitan, torchtitan_reading
from simllm.export.job import Exported, Imported, Job
from simllm.training import Estimate

__all__ = ["FRAMEWORKS", "export", "read_settings"]

_WRITERS: Mapping[str, Callable[[Job], Exported]] = {
    "megatron": megatron.write,
    "deepspeed": deepspeed.write,
    "torchtitan": torchtitan.write,
    "accelerate": accelerate.write,
}
_READERS: Mapping[str, Callable[[str, int | None], Imported]] = {
    ".json": deepspeed.read,
    ".toml": torchtitan_reading.read,
    ".yaml": accelerate.read,
    ".yml": accelerate.read,
    ".txt": megatron_reading.read,
    ".args": megatron_reading.read,
    ".sh": megatron_reading.read,
}

FRAMEWORKS = tuple(_WRITERS)

_LARGEST_BYTES = 2**20


def export(job: Job | Estimate, framework: str) -> Exported:
    """A plan in the words of a framework.

    Parameters
    ----------
    job : Job or Estimate
    framework : {"megatron", "deepspeed", "torchtitan", "accelerate"}

    Raises
    ------
    UnsupportedError
        Naming what of the plan the framework cannot express.

    Examples
    --------
    >>> from simllm import Cluster, Model, Plan, Training, estimate
    >>> plan = Plan(tp=2, dp=4, sequence_parallel=True, global_batch_size=8)
    >>> answer = estimate(Model.load("llama-3-8b"), Cluster.load("dgx-h100", 8), plan, Training(seq_len=4096))
    >>> "--tensor-model-parallel-size 2" in export(answer, "megatron").text
    True
    """
    if framework not in _WRITERS:
        raise unknown_name("framework", framework, _WRITERS)
    return _WRITERS[framework](Job.of(job) if isinstance(job, Estimate) else job)


def read_settings(path: str | Path, gpus: int | None = None) -> Imported:
    """What the file of a framework says of a plan.

    Parameters
    ----------
    path : str or Path
        DeepSpeed's JSON, torchtitan's TOML, accelerate's YAML, or Megatron-LM's arguments (.txt, .args, .sh).
    gpus : int, optional
        GPUs of the run, from which the degree that a file leaves open follows.

    Raises
    ------
    InputError
        It cannot be read, is mistyped, or sets what is not modelled.
    """
    place = Path(path)
    reader = _READERS.get(place.suffix.lower())
    if reader is None:
        raise InputError(
            f"{path}: whose file it is shows in its name; .json is DeepSpeed's, .toml torchtitan's, .yaml accelerate's "
            "and .txt holds Megatron-LM's arguments"
        )
    try:
        if place.stat().st_size > _LARGEST_BYTES:
            raise InputError(f"{path} is larger than any configuration")
        text = place.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        return reader(text, gpus)
    except InputError as error:
        raise type(error)(f"{path}: {error}") from None
