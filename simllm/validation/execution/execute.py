"""One case on one rank of a real process group: the single process first, then the plan."""

from __future__ import annotations

import torch

from simllm.validation.execution.case import Case
from simllm.validation.execution.parallelize import set_attention
from simllm.validation.execution.reference import Transformer
from simllm.validation.execution.runner import Record, Runner, batch_of

__all__ = ["execute"]


def execute(case: Case, device: str = "cpu") -> Record:
    """Run a case on this rank; the default process group must exist.

    Parameters
    ----------
    case : Case
    device : {"cpu", "cuda"}

    Returns
    -------
    Record
    """
    torch.manual_seed(0)
    with torch.device(device):
        reference = Transformer(case.spec)
    set_attention(reference, case)
    ids, labels = batch_of(case, device)
    loss = reference(ids, labels)
    loss.backward()
    runner = Runner(case, device)
    runner.build({name: tensor.detach().clone() for name, tensor in reference.state_dict().items()})
    runner.connect()
    own = runner.gradients()
    error = runner.gradient_error(reference)
    reference_loss = loss.item()
    del reference, loss
    runner.optimizer.step()
    runner.step()  # DistributedDataParallel settles its buckets in the second step
    record = runner.record()
    record.loss, record.reference_loss, record.gradient_error = own, reference_loss, error
    record.step_s = runner.timed(case.timed_steps)
    return record
