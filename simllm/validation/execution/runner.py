"""One rank's part of a plan: built, stepped, recorded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.parallel import DistributedDataParallel

from simllm.parallel.schedules import Action
from simllm.validation.execution.case import Case
from simllm.validation.execution.dispatch import local_tensor
from simllm.validation.execution.memory_log import MemoryLog
from simllm.validation.execution.parallelize import (
    Meshes,
    add_recompute,
    build_meshes,
    expert_parameters,
    finish_gradients,
    shard_data_parallel,
    splits_experts,
    tensor_parallel,
)
from simllm.validation.execution.pipelining import make_schedule, make_stages
from simllm.validation.execution.recorder import Call, CommunicationLog, FlopLog, SavedLog
from simllm.validation.execution.reference import Block, Head, Stem, Transformer

__all__ = ["Record", "Runner", "batch_of"]


@dataclass(kw_only=True)
class Record:
    """What one rank did in one optimizer step.

    Attributes
    ----------
    persistent, peak : dict of str to int
        Bytes by kind after the step, and at the peak of the step.
    saved : dict of str to int
        Bytes that each part keeps for its backward pass: ``stem``, ``layers.3``, ``head``, ...
    actions : list of Action
        Forward and backward passes of model chunks in the order in which they ran.
    gradient_error : float
        Largest difference of a gradient from the single process, over the largest entry of that gradient.
    resident_bytes : int
        Of a fake cluster, most memory of the process that stood for it.
    """

    rank: int
    parameters: int
    flops: int
    calls: list[Call]
    saved: dict[str, int]
    persistent: dict[str, int]
    peak: dict[str, int]
    peak_bytes: int
    actions: list[Action] = field(default_factory=list)
    loss: float | None = None
    reference_loss: float | None = None
    gradient_error: float = 0.0
    step_s: list[float] = field(default_factory=list)
    resident_bytes: int = 0


def batch_of(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids and labels of a whole step, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    shape = (case.plan.global_batch_size, case.seq_len)
    ids, labels = (torch.randint(case.spec.vocab_size, shape, generator=generator) for _ in range(2))
    return ids.to(device), labels.to(device)


class Runner:
    """The rank's model parts, optimizer and step.

    Parameters
    ----------
    case : Case
    device : str
        Type of the device of the process group: cpu or cuda.
    """

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self.meshes: Meshes = build_meshes(case, device)
        whole = self.meshes.whole
        self.pp_rank, self.dp_rank = whole["pp"].get_local_rank(), whole["dp"].get_local_rank()
        self.spans = case.spans(self.pp_rank)
        self.tied = self._tied_group()
        self.saved = SavedLog()
        self.actions: list[Action] = []

    # -- building ----------------------------------------------------------------------------------------------

    def build(self, states: dict[str, Tensor] | None) -> None:
        """Make this rank's parts; ``states``: the weights of the whole model, or None on the meta device."""
        case = self.case
        with torch.device("meta" if states is None else self.device):
            encoder_decoder = case.spec.encoder is not None
            self.parts = [
                Transformer(case.spec, None if encoder_decoder or case.plan.pp == 1 else span) for span in self.spans
            ]
        for part in self.parts:
            if states is not None:
                part.load_state_dict({name: states[name] for name in part.state_dict()})
            tensor_parallel(part, case, self.meshes)
            if part.head is not None and self.parts[0].stem is not None and case.spec.head.tied:
                part.head.lm_head.weight = self.parts[0].stem.token.weight  # both ends of a V are on this rank
            add_recompute(part, case)
            shard_data_parallel(part, case, self.meshes)
            self._observe(part)

    def connect(self) -> None:
        """Wrap replicated parts, make the optimizer and the pipeline; weights are real or fake, no longer meta."""
        case, plan = self.case, self.case.plan
        modules: list[nn.Module] = list(self.parts)
        if plan.dp > 1 and plan.zero in ("0", "1") and plan.tp == 1:
            modules = [self._replicate(part) for part in self.parts]
        self.modules = modules
        parameters = _unique(p for part in self.parts for p in part.parameters())
        options: dict[str, Any] = {"lr": 1e-3, "foreach": False}
        self.optimizer: torch.optim.Optimizer
        if plan.zero == "1" and plan.dp > 1:
            group = self.meshes.whole["dp"].get_group()
            self.optimizer = ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, process_group=group, **options)
        else:
            self.optimizer = torch.optim.AdamW(parameters, **options)
        self.stages: list[Any] = []
        self.schedule: Any = None
        if plan.pp > 1:
            group = self.meshes.whole["pp"].get_group()
            self.stages = make_stages(case, modules, self.pp_rank, group, self.device, self.actions)
            self.schedule = make_schedule(case, self.stages)
        self.ids, self.labels = self._own_batch(case)

    def _replicate(self, part: Transformer) -> nn.Module:
        if splits_experts(self.case):
            own = {id(p) for p in expert_parameters(part)}
            names = [name for name, p in part.named_parameters() if id(p) in own]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(part, names)
        group = self.meshes.whole["dp"].get_group()
        return DistributedDataParallel(part, process_group=group, gradient_as_bucket_view=True)

    def _observe(self, part: Transformer) -> None:
        for name, module in part.named_modules():
            if isinstance(module, Block | Stem | Head):
                module.observe = self.saved.observer(name, partial(self._others, part))

    def _others(self, part: Transformer) -> list[Tensor]:
        """What no part keeps for itself: tables, and the batch."""
        return [*_tables(part), self.ids, self.labels]

    def _own_batch(self, case: Case) -> tuple[Tensor, Tensor]:
        ids, labels = batch_of(case, self.device)
        own = case.plan.global_batch_size // case.plan.dp
        rows = slice(self.dp_rank * own, (self.dp_rank + 1) * own)
        return ids[rows], labels[rows]

    def _tied_group(self) -> Any:
        """The first and the last stage share the gradients of a tied table; every rank makes every group."""
        plan = self.case.plan
        if not self.case.spec.head.tied or plan.pp == 1 or plan.pipeline.placement == "v":
            return None
        stage = plan.tp * plan.dp
        mine = None
        for inside in range(stage):
            ranks = [inside, (plan.pp - 1) * stage + inside]
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                mine = group
        return mine

    # -- the step ----------------------------------------------------------------------------------------------

    def gradients(self) -> float | None:
        """Forward and backward of all micro-batches and every reduction; the loss, on ranks that see it."""
        plan = self.case.plan
        self.optimizer.zero_grad(set_to_none=False)
        with loss_parallel() if plan.tp > 1 else nullcontext():
            loss = self._accumulate() if self.schedule is None else self._run_pipeline()
        for part in self.parts:
            finish_gradients(part, self.case, self.meshes)
        if self.tied is not None:
            self._sum_tied()
        return loss

    def _accumulate(self) -> float:
        plan, module = self.case.plan, self.modules[0]
        m = plan.num_micro_batches
        total: Tensor | float = 0.0
        for i in range(m):
            rows = slice(i * plan.micro_batch_size, (i + 1) * plan.micro_batch_size)
            last = i == m - 1
            replicated = isinstance(module, DistributedDataParallel)
            with module.no_sync() if replicated and not last else nullcontext():  # type: ignore[operator]
                loss = module(self.ids[rows], self.labels[rows]) / m
                loss.backward()
            total = total + loss.detach()
            del loss
        return _number(total)

    def _run_pipeline(self) -> float | None:
        losses: list[Tensor] = []
        first, last = (part is not None for part in (self.parts[0].stem, self.parts[-1].head))
        assert self.schedule is not None
        self.schedule.step(
            *((self.ids,) if first else ()),
            return_outputs=False,
            **({"labels": self.labels, "target": self.labels, "losses": losses} if last else {}),
        )
        return _number(torch.stack([loss.detach() for loss in losses]).sum()) if last else None

    def _sum_tied(self) -> None:
        for part in self.parts:
            table = part.stem.token.weight if part.stem is not None else None
            table = part.head.lm_head.weight if part.head is not None else table
            if table is not None:
                assert table.grad is not None
                dist.all_reduce(local_tensor(table.grad), group=self.tied)

    def step(self) -> float | None:
        """One optimizer step."""
        loss = self.gradients()
        self.optimizer.step()
        return loss

    # -- recording ---------------------------------------------------------------------------------------------

    def record(self, count_flops: bool = True) -> Record:
        """One recorded step; an unrecorded one must have come before, so that all states exist."""
        self.actions.clear()
        memory, calls, flops = MemoryLog(), CommunicationLog(), FlopLog()
        self._track(memory)
        with ExitStack() as stack:
            for log in (memory, calls, *([flops] if count_flops else [])):
                stack.enter_context(log)
            self.step()
        persistent = {kind: _storage_bytes(tensors) for kind, tensors in self.persistent_tensors().items()}
        numel = sum(local_tensor(p).numel() for p in _unique(p for part in self.parts for p in part.parameters()))
        return Record(
            rank=dist.get_rank(),
            parameters=numel,
            flops=flops.flops,
            calls=calls.calls,
            saved=self.saved.bytes,
            persistent=persistent,
            peak=memory.peak,
            peak_bytes=memory.peak_bytes,
            actions=list(self.actions),
        )

    def _track(self, memory: MemoryLog) -> None:
        """Tell the log what is there before the step, and hold on to none of it: a step may replace it."""
        for kind, tensors in self.persistent_tensors().items():
            memory.track(tensors, kind)

    def persistent_tensors(self) -> dict[str, list[Tensor]]:
        """What stays from step to step, by kind; the optimizer's step counters apart."""
        parameters = _unique(p for part in self.parts for p in part.parameters())
        optimizer = getattr(self.optimizer, "optim", self.optimizer)
        states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        tables = [t for part in self.parts for t in _tables(part)]
        return {
            "parameters": list(parameters),
            "gradients": [p.grad for p in parameters if p.grad is not None],
            "optimizer": [t for t in states if t.dim() > 0],
            "counters": [t for t in states if t.dim() == 0],
            "tables": [*tables, self.ids, self.labels],
            "pipeline buffers": list(self._receive_buffers()),
        }

    def _receive_buffers(self) -> Iterator[Tensor]:
        """What stages of a pipeline receive in: made in the first step, one for each micro-batch."""
        for stage in self.stages:
            for infos in (stage.args_recv_info, stage.grad_recv_info):
                found = [info.buffer for micro_batch in infos.values() for info in micro_batch]
                yield from (buffer for buffer in found if isinstance(buffer, Tensor))

    def timed(self, steps: int) -> list[float]:
        """Seconds of steps that all ranks begin together."""
        seconds = []
        for _ in range(steps):
            dist.barrier()
            begin = time.perf_counter()
            self.step()
            if self.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        return seconds

    # -- against the single process ------------------------------------------------------------------------------

    def gradient_error(self, reference: nn.Module) -> float:
        """Largest difference of a gradient from that of ``reference``, over the largest entry of that gradient.

        A gradient that is zero but for rounding (a bias on keys shifts all scores alike) is held against a thousandth
        of the largest gradient of the model.
        """
        wanted = {name: p.grad for name, p in reference.named_parameters(remove_duplicate=False)}
        least = 1e-3 * max(float(g.abs().max()) for g in wanted.values() if g is not None)
        worst = 0.0
        for part in self.parts:
            own = {id(p) for p in expert_parameters(part)} if self.case.plan.ep > 1 else set()
            for name, parameter in part.named_parameters():
                gradient, target = parameter.grad, wanted[name]
                assert gradient is not None, name
                assert target is not None, name
                if id(parameter) in own:
                    rank, ep = dist.get_rank() % self.case.plan.ep, self.case.plan.ep
                    target = target.chunk(ep, dim=0)[rank]
                whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                scale = max(least, float(target.abs().max()))
                worst = max(worst, float((whole - target).abs().max()) / scale)
        return worst


def _number(value: Tensor | float) -> float:
    """A loss as a number; zero where tensors are fake and have none."""
    if isinstance(value, Tensor):
        value = local_tensor(value)
        return 0.0 if isinstance(value, FakeTensor) else float(value)
    return value


def _unique(parameters: Iterator[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(p): p for p in parameters}.values())


def _storage_bytes(tensors: list[Tensor]) -> int:
    storages = {s._cdata: s.nbytes() for s in (local_tensor(t).untyped_storage() for t in tensors)}
    return sum(storages.values())


def _tables(part: Transformer) -> list[Tensor]:
    """Tables that layers look up: of masks, cosines and sines."""
    found: dict[int, Tensor] = {}
    for module in part.modules():
        tables = getattr(module, "tables", None)
        if tables is not None:
            found |= {id(t): t for t in tables.made.values()}
    return list(found.values())
