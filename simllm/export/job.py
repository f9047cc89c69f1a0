"""What is exported and what comes out: a job, the file of a framework, and the settings read from one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NoReturn

import msgspec

from simllm.errors import InputError, UnsupportedError
from simllm.models import Model
from simllm.parallel.plan import Plan
from simllm.training import Estimate, Training
from simllm.training.setup import plan_from_dict

__all__ = ["ROTATE_METHODS", "Elsewhere", "Exported", "Imported", "Job", "refuse"]

#: What PyTorch calls its kinds of context parallelism (set_rotate_method in torch.distributed.tensor.experimental).
ROTATE_METHODS = {"all_gather": "allgather", "p2p": "alltoall"}

#: Settings of a plan that every exporter writes or refuses.
_SETTINGS = (
    "tp",
    "pp",
    "vpp",
    "cp",
    "cp_comm_type",
    "cp_a2a",
    "ep",
    "etp",
    "dp",
    "zero",
    "hsdp_shard",
    "sequence_parallel",
    "micro_batch_size",
    "global_batch_size",
    "recompute",
    "precision",
    "schedule",
    "uneven_layers",
)


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """A setting of the plan that a framework does not keep in its file.

    Attributes
    ----------
    option, value : str
        As `simllm estimate` spells them.
    where : str
        Where the framework takes it from.
    """

    option: str
    value: str
    where: str


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A plan as the file of a framework.

    Attributes
    ----------
    framework : str
    text : str
        The file.
    launch : str
        The command that starts it, FILE standing for the file.
    elsewhere : tuple of Elsewhere
        Settings of the plan that the file cannot hold.
    notes : tuple of str
        What a person should know before the run.
    """

    framework: str
    text: str
    launch: str
    elsewhere: tuple[Elsewhere, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable keys."""
        return {
            "framework": self.framework,
            "text": self.text,
            "launch": self.launch,
            "elsewhere": [{"option": e.option, "value": e.value, "where": e.where} for e in self.elsewhere],
            "notes": list(self.notes),
        }


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What the file of a framework says of a plan.

    Attributes
    ----------
    framework : str
    settings : dict of str to value
        Settings of a plan and its training, by the names of `simllm estimate`'s options.
    model : Model or None
        The model, where the file describes one.
    notes : tuple of str
        Every key that was not used, and what stands in for it.
    """

    framework: str
    settings: Mapping[str, Any]
    model: Model | None = None
    notes: tuple[str, ...] = ()


class _ModelPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    config: dict[str, Any]
    mtp: bool
    vocab_multiple: int


class _Setup(msgspec.Struct, frozen=True, kw_only=True):
    model: _ModelPart | None
    gpus_per_node: int
    hsdp_shard: int
    optimizer: str
    method: str | None = None
    master_weights: bool | None
    gradient_precision: Literal["fp32", "bf16"] | None
    gradient_clipping: bool = True
    expert_imbalance: float | Literal["random"] = 1.0
    capacity_factor: float | None = None
    memory_headroom: float


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    plan: dict[str, Any]
    setup: _Setup
    seq_len: int
    stack: str
    flop_convention: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """A plan with what a framework must know besides it.

    Attributes
    ----------
    model : Model
    plan : Plan
        With the ranks of an HSDP group resolved.
    training : Training
    gpus_per_node : int
    """

    model: Model
    plan: Plan
    training: Training
    gpus_per_node: int
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.model.method is not None:
            _refuse_method(self.model.method.name, self.model.name)

    @classmethod
    def of(cls, answer: Estimate) -> Job:
        """The job that an estimate priced."""
        return cls(
            model=answer.model,
            plan=replace(answer.plan, hsdp_shard=answer.hsdp_shard),
            training=answer.training,
            gpus_per_node=min(answer.cluster.gpus_per_node, answer.cluster.num_gpus),
            config=answer.model.config or {},
        )

    @classmethod
    def from_document(cls, document: Any, number: int = 1, model: Model | None = None) -> Job:
        """The job in the JSON of ``simllm estimate`` or ``simllm plan``.

        Parameters
        ----------
        document : dict
            The parsed JSON.
        number : int
            Which plan of a search, from 1.
        model : Model, optional
            Instead of the document's; needed where that was made by other means than a config.

        Raises
        ------
        InputError
            It is no such document, or has no such plan.
        """
        if isinstance(document, dict) and "plans" in document:
            plans = document["plans"]
            if not isinstance(plans, list) or not plans:
                raise InputError("the document holds no plan: nothing fits; export a plan that does")
            if not 1 <= number <= len(plans):
                raise InputError(f"plan {number} of {len(plans)}; give a number from 1 to {len(plans)}")
            document = plans[number - 1]
        elif number != 1:
            raise InputError(f"plan {number}: the document holds one estimate; give 1")
        try:
            answer = msgspec.convert(document, _Answer)
        except msgspec.ValidationError as error:
            raise InputError(f"not the JSON of simllm estimate or simllm plan: {error}; write it with --json") from None
        setup = answer.setup
        if setup.method is not None:
            _refuse_method(setup.method, answer.model)
        if model is None and setup.model is None:
            raise InputError(f"the document does not hold the config of {answer.model}; give --model")
        if model is None:
            part = setup.model
            assert part is not None
            model = Model.from_config(part.config, answer.model, mtp=part.mtp, vocab_multiple=part.vocab_multiple)
        return cls(
            model=model,
            plan=replace(plan_from_dict(answer.plan), hsdp_shard=setup.hsdp_shard),
            training=Training(
                seq_len=answer.seq_len,
                stack=answer.stack,
                memory_headroom=setup.memory_headroom,
                optimizer=setup.optimizer,
                master_weights=setup.master_weights,
                gradient_precision=setup.gradient_precision,
                gradient_clipping=setup.gradient_clipping,
                expert_imbalance=setup.expert_imbalance,
                capacity_factor=setup.capacity_factor,
                flop_convention=answer.flop_convention,
            ),
            gpus_per_node=setup.gpus_per_node,
            config=model.config or {},
        )

    @property
    def nodes(self) -> int:
        """Nodes in use."""
        return -(-self.plan.num_gpus // self.gpus_per_node)

    @property
    def torchrun(self) -> str:
        """The launcher with its sizes."""
        return f"torchrun --nnodes {self.nodes} --nproc-per-node {self.gpus_per_node}"

    @property
    def shards(self) -> int:
        """Ranks that data and context parallelism can shard states over."""
        return self.plan.dp * self.plan.cp

    def hsdp_groups(self, framework: str) -> int:
        """Replicas of the groups that hybrid sharding shards inside, whole context-parallel groups each."""
        shard = self.plan.hsdp_shard
        if shard == self.shards:
            refuse(framework, f"hsdp_shard={shard} of {self.shards} ranks", "that is one group; shard without groups")
        if shard == 1:
            refuse(framework, "hsdp_shard=1", "groups of one rank share nothing; use zero=0")
        if shard % self.plan.cp:
            refuse(framework, f"hsdp_shard={shard} with cp={self.plan.cp}", "its groups hold whole context groups")
        return self.shards // shard

    def require_known(self, framework: str, known: Iterable[str] = _SETTINGS) -> None:
        """Refuse settings of the plan that an exporter knows nothing of, rather than drop them."""
        default = Plan()
        for name in sorted({item.name for item in fields(Plan)} - set(known)):
            value = getattr(self.plan, name)
            if value != getattr(default, name):
                refuse(framework, f"{name}={value}", "has no counterpart there")

    def routing_note(self) -> tuple[str, ...]:
        """A warning where the plan was priced for experts that are not in balance."""
        imbalance = self.training.expert_imbalance
        if imbalance == 1.0:
            return ()
        return (f"expert_imbalance={imbalance} was assumed of the router; no file can ask for it",)

    def stack_note(self, stacks: tuple[str, ...]) -> tuple[str, ...]:
        """A warning where the plan was priced for other software."""
        name = self.training.software.name
        if name in stacks:
            return ()
        return (f"the plan was priced for {name}; price it again with --stack {stacks[0]} before trusting its figures",)


def _refuse_method(method: str, model: str) -> NoReturn:
    raise UnsupportedError(
        f"{model} fine-tuned with {method} cannot be exported: the frameworks' files hold a plan of pre-training, and "
        "what is frozen or added is not in it; export a plan of the model itself"
    )


def refuse(framework: str, what: str, why: str) -> NoReturn:
    """Raise: a framework cannot express a setting.

    Raises
    ------
    UnsupportedError
        Always.
    """
    raise UnsupportedError(f"{framework} cannot express {what}: {why}")
