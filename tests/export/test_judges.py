"""What is exported is accepted, with the same meaning, by the frameworks' own parsers."""

from __future__ import annotations

import argparse
import ast
import csv
import dataclasses
import importlib.util
import json
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from simllm.errors import UnsupportedError
from simllm.export import Exported, Job, export, torchtitan
from simllm.export.job import ROTATE_METHODS
from simllm.models.spec import MoESpec
from simllm.parallel.plan import split_layers
from tests.export.jobs import job, jobs

PUBLISHED = Path(__file__).parent.parent / "published"
JUDGED = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow]
)


def exported(chosen: Job, framework: str) -> Exported:
    try:
        return export(chosen, framework)
    except UnsupportedError:
        assume(False)
        raise


# -- Megatron-LM ---------------------------------------------------------------------------------------------------


def pattern(text: str) -> Any:
    """A number, or a list written as sums of repeated lists."""
    return int(text) if text.isdigit() else eval(text, {"__builtins__": {}})


KINDS: dict[str, dict[str, Any]] = {
    "int": {"type": int},
    "float": {"type": float},
    "flag": {"action": "store_true"},
    "text": {"type": str},
    "texts": {"type": str, "nargs": "*"},
    "ints": {"type": int, "nargs": "+"},
    "tuple": {"type": lambda text: tuple(int(part) for part in text.strip("()").split(","))},
    "pattern": {"type": pattern},
}


def megatron_parser() -> argparse.ArgumentParser:
    """A parser of the published arguments: names, kinds and choices."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    with (PUBLISHED / "megatron_arguments.csv").open() as file:
        for row in csv.DictReader(file):
            choices = {"choices": row["choices"].split("|")} if row["choices"] else {}
            parser.add_argument(f"--{row['argument']}", **KINDS[row["kind"]], **choices)
    return parser


def parsed(text: str) -> dict[str, Any]:
    """What the parser makes of a file; only what is set."""
    values = vars(megatron_parser().parse_args(shlex.split(text)))
    return {name: value for name, value in values.items() if value is not None and value is not False}


@JUDGED
@given(data=st.data())
def test_megatron_core_accepts_the_model_and_the_plan(data: st.DataObject) -> None:
    """The fields that Megatron-LM passes on to TransformerConfig make one, by the rules of its own checks."""
    pytest.importorskip("megatron.core")
    import torch
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    chosen: Job = data.draw(jobs("megatron"))
    plan, spec = chosen.plan, chosen.model.spec
    args = parsed(exported(chosen, "megatron").text)
    latent = args.get("multi_latent_attention", False)
    kind = MLATransformerConfig if latent else TransformerConfig
    fields = {field.name for field in dataclasses.fields(kind)}
    values = {name: value for name, value in args.items() if name in fields}
    values |= {
        "num_moe_experts": args.get("num_experts"),
        "num_query_groups": args.get("num_query_groups") if args.get("group_query_attention") else None,
        "virtual_pipeline_model_parallel_size": args.get("num_virtual_stages_per_pipeline_rank"),
        "pipeline_dtype": torch.bfloat16,
        "gated_linear_unit": args.get("swiglu", False),
        "activation_func": torch.nn.functional.silu if args.get("swiglu") else torch.nn.functional.gelu,
        "add_bias_linear": not args.get("disable_bias_linear", False),
        "bf16": args.get("bf16", False),
        "fp16": args.get("fp16", False),
    }
    if "pipeline_model_parallel_layout" in args and plan.vpp > 1:
        values["virtual_pipeline_model_parallel_size"] = plan.vpp
    # One kind of context parallelism stands for every layer.
    values |= {"cp_comm_type": kinds[0]} if len(kinds := values.get("cp_comm_type", ())) == 1 else {}
    # With fp8 and fp4 it asks for the version of TransformerEngine, which needs a GPU.
    values.pop("fp8_recipe", None)
    config = kind(**values)
    assert config.num_layers == spec.num_hidden_layers
    assert config.hidden_size == spec.hidden_size
    assert (config.tensor_model_parallel_size, config.pipeline_model_parallel_size) == (plan.tp, plan.pp)
    assert (config.context_parallel_size, config.expert_model_parallel_size) == (plan.cp, plan.ep)
    moe = next((b.mlp for b in spec.decoder.layers if isinstance(b.mlp, MoESpec)), None)
    if moe is not None:
        assert (config.num_moe_experts, config.moe_router_topk) == (moe.num_experts, moe.num_experts_per_tok)
    assert args["global_batch_size"] % (args["micro_batch_size"] * plan.dp) == 0


@JUDGED
@given(data=st.data())
def test_megatron_core_deals_out_the_layers_that_the_plan_has(data: st.DataObject) -> None:
    """Layers of every pipeline rank and chunk, by Megatron-Core's own function, equal those of the plan."""
    pytest.importorskip("megatron.core")
    import torch
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    chosen: Job = data.draw(jobs("megatron"))
    plan = chosen.plan
    assume(plan.pp > 1)
    args = parsed(exported(chosen, "megatron").text)
    layout = args.get("pipeline_model_parallel_layout")
    config = TransformerConfig(
        num_layers=args["num_layers"],
        hidden_size=64,
        num_attention_heads=4,
        pipeline_model_parallel_size=plan.pp,
        virtual_pipeline_model_parallel_size=plan.vpp if plan.vpp > 1 else None,
        pipeline_dtype=torch.bfloat16,
        pipeline_model_parallel_layout=layout,
        account_for_embedding_in_pipeline_split=args.get("account_for_embedding_in_pipeline_split", False),
        account_for_loss_in_pipeline_split=args.get("account_for_loss_in_pipeline_split", False),
    )
    if layout:
        parts = config.pipeline_model_parallel_layout.layout
        built = [
            sum(layer.name == "decoder" for layer in parts[rank][chunk])
            for chunk in range(plan.vpp)
            for rank in range(plan.pp)
        ]
    else:
        built = [
            get_num_layers_to_build(config, vp_stage=chunk if plan.vpp > 1 else None, pp_rank=rank)
            for chunk in range(plan.vpp)
            for rank in range(plan.pp)
        ]
    assert tuple(built) == split_layers(args["num_layers"], plan.pp * plan.vpp, plan.uneven_layers)


def test_arguments_of_a_plan_by_hand() -> None:
    chosen = job(
        "deepseek-v3",
        tp=2,
        pp=4,
        ep=8,
        dp=8,
        sequence_parallel=True,
        uneven_layers=True,
        precision="fp8",
        global_batch_size=512,
    )
    args = parsed(export(chosen, "megatron").text)
    assert args["moe_layer_freq"] == [0] * 3 + [1] * 58
    assert args["pipeline_model_parallel_layout"] == "|".join(["E" + "t" * 16, "t" * 16, "t" * 16, "t" * 13 + "L"])
    assert (args["ffn_hidden_size"], args["moe_ffn_hidden_size"]) == (18432, 2048)
    assert (args["q_lora_rank"], args["kv_lora_rank"], args["qk_pos_emb_head_dim"]) == (1536, 512, 64)
    assert (args["fp8_format"], args["bf16"], args["attention_dropout"]) == ("hybrid", True, 0.0)
    assert (args["expert_model_parallel_size"], args["expert_tensor_parallel_size"]) == (8, 1)


def test_kinds_of_context_parallelism_are_arguments_of_their_own() -> None:
    two = {"cp": 8, "dp": 1, "cp_comm_type": "a2a+p2p", "cp_a2a": 4}
    args = parsed(export(job("llama-3-8b", **two), "megatron").text)
    assert args["context_parallel_size"] == 8
    assert (args["cp_comm_type"], args["hierarchical_context_parallel_sizes"]) == (["a2a+p2p"], [4, 2])
    args = parsed(export(job("llama-3-8b", cp=8, dp=1, cp_comm_type="all_gather"), "megatron").text)
    assert (args["cp_comm_type"], "hierarchical_context_parallel_sizes" in args) == (["all_gather"], False)
    assert "cp_comm_type" not in parsed(export(job("llama-3-8b", cp=8, dp=1), "megatron").text)  # a ring by default


# -- DeepSpeed -----------------------------------------------------------------------------------------------------


@JUDGED
@given(data=st.data())
def test_deepspeed_reads_its_json_with_the_same_meaning(data: st.DataObject) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig

    chosen: Job = data.draw(jobs("deepspeed"))
    plan, training = chosen.plan, chosen.training
    ranks = types.SimpleNamespace(get_data_parallel_world_size=lambda: plan.dp)
    document = json.loads(exported(chosen, "deepspeed").text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepspeed.comm.get_rank", lambda *_: 0)
        config = DeepSpeedConfig(document, mpu=ranks)
    assert config.train_batch_size == plan.global_batch_size
    assert config.train_micro_batch_size_per_gpu == plan.micro_batch_size
    assert config.gradient_accumulation_steps == plan.num_micro_batches
    assert int(config.zero_optimization_stage) == int(plan.zero)
    assert config.bfloat16_config.enabled == (plan.precision == "bf16")
    assert config.float16_config.enabled == (plan.precision == "fp16")
    assert config.bfloat16_config.bf16_optimizer_states == (training.master_weights is False)
    assert config.grad_accum_dtype == training.gradient_precision
    assert config.gradient_clipping == training.gradient_clipping
    assert (config.tensor_parallel_config.autotp_size or 1) == plan.tp
    assert config.optimizer_name.lower() in ("adamw", "sgd", "muon", "adafactor")
    unread = set(document) - {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "bf16",
        "fp16",
        "zero_optimization",
        "optimizer",
        "tensor_parallel",
        "data_types",
        "gradient_clipping",
        "sequence_parallel_size",
        "zero_allow_untested_optimizer",
    }
    assert not unread


# -- torchtitan ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torchtitan_config() -> Iterator[Any]:
    """torchtitan's ConfigManager; its package imports Triton kernels, which its configuration does without."""
    place = importlib.util.find_spec("torchtitan")
    if place is None or place.submodule_search_locations is None:
        pytest.skip("torchtitan is not installed")
    package = types.ModuleType("torchtitan")
    package.__path__ = list(place.submodule_search_locations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchtitan", package)
        yield importlib.import_module("torchtitan.config.manager")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchtitan"]:
        del sys.modules[name]


@settings(parent=JUDGED, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_torchtitan_reads_its_toml_with_the_same_meaning(
    torchtitan_config: Any, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    chosen: Job = data.draw(jobs("torchtitan"))
    plan = chosen.plan
    file = tmp_path_factory.mktemp("job") / "job.toml"
    file.write_text(exported(chosen, "torchtitan").text)
    config = torchtitan_config.ConfigManager().parse_args([f"--job.config_file={file}"])
    degrees, training = config.parallelism, config.training
    assert degrees.tensor_parallel_degree == plan.tp
    assert degrees.pipeline_parallel_degree == plan.pp
    assert degrees.context_parallel_degree == plan.cp
    assert (degrees.expert_parallel_degree, degrees.expert_tensor_parallel_degree) == (plan.ep, plan.etp)
    assert degrees.data_parallel_replicate_degree * degrees.data_parallel_shard_degree == plan.dp
    assert (training.seq_len, training.global_batch_size) == (chosen.training.seq_len, plan.global_batch_size)
    passes = plan.num_micro_batches if plan.pp > 1 else 1
    assert training.local_batch_size == passes * plan.micro_batch_size
    if plan.pp > 1:
        from torch.distributed.pipelining.schedules import get_schedule_class

        assert get_schedule_class(degrees.pipeline_parallel_schedule) is not None


def test_flavors_of_torchtitan_have_the_shapes_that_it_gives_them(torchtitan_config: Any) -> None:
    """Its tables of models, read as text because they import Triton kernels."""
    root = Path(sys.modules["torchtitan"].__path__[0]) / "models"
    checked = 0
    for (name, flavor), (model, pipelines) in torchtitan.flavors().items():
        source = (root / name / "__init__.py").read_text()
        assert ("pipelining_fn=pipeline_llm" in source) is pipelines
        values = _flavor(source, flavor)
        spec = model.spec
        assert (values["dim"], values["n_layers"]) == (spec.hidden_size, spec.num_hidden_layers)
        attention = spec.decoder.layers[0].mixer
        assert values["n_heads"] == attention.num_attention_heads  # type: ignore[union-attr]
        assert values.get("vocab_size", 128256) == spec.vocab_size
        moe = next((b.mlp for b in spec.decoder.layers if isinstance(b.mlp, MoESpec)), None)
        if moe is not None:
            inner = values["moe_args"]
            assert (inner["num_experts"], inner["top_k"]) == (moe.num_experts, moe.num_experts_per_tok)
            assert values["moe_inter_dim"] == moe.expert.intermediate_size
        if "hidden_dim" in values and moe is None:
            assert values["hidden_dim"] == spec.decoder.layers[0].mlp.intermediate_size  # type: ignore[union-attr]
        if name == "llama3":
            width = int(values["ffn_dim_multiplier"] * int(8 * values["dim"] / 3))
            width = -(-width // values["multiple_of"]) * values["multiple_of"]
            assert width == spec.decoder.layers[0].mlp.intermediate_size  # type: ignore[union-attr]
        checked += 1
    assert checked == 14


def _flavor(source: str, flavor: str) -> dict[str, Any]:
    """The keyword arguments of one entry of a table of models."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == flavor and isinstance(value, ast.Call):
                    return _keywords(value)
    raise AssertionError(f"no flavor {flavor}")


def _keywords(call: ast.Call) -> dict[str, Any]:
    return {
        str(word.arg): _keywords(word.value) if isinstance(word.value, ast.Call) else ast.literal_eval(word.value)
        for word in call.keywords
    }


# -- accelerate ----------------------------------------------------------------------------------------------------


@settings(parent=JUDGED, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_accelerate_reads_its_yaml_with_the_same_meaning(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Through ``accelerate launch``: its file, its checks, the environment it makes, the plugins that read that."""
    pytest.importorskip("accelerate")
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    chosen: Job = data.draw(jobs("accelerate"))
    plan = chosen.plan
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(exported(chosen, "accelerate").text)
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(file), "train.py"]))
    assert args.num_processes == plan.num_gpus
    assert args.num_machines == chosen.nodes
    assert args.mixed_precision == {"fp32": "no"}.get(plan.precision, plan.precision)
    assert bool(args.use_fsdp) == (plan.zero != "0")
    if not args.use_fsdp:
        return
    args.main_process_ip, args.main_process_port = "localhost", 29500
    with pytest.MonkeyPatch.context() as patch:
        for name, value in prepare_multi_gpu_env(args).items():
            patch.setenv(name, value)
        for name in ("FSDP_SYNC_MODULE_STATES", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
            patch.setenv(name, "false")  # else it asks for a device, of which there is none here
        plugin = FullyShardedDataParallelPlugin()
        sizes = ParallelismConfig() if args.use_parallelism_config else None
    assert plugin.activation_checkpointing == (str(plan.recompute) == "full")
    first = chosen.training.stack in ("fsdp1", "fsdp1-compiled")
    assert plugin.fsdp_version == (1 if first else 2)
    if first:
        names = {"2": "SHARD_GRAD_OP", "3": "FULL_SHARD", "hsdp": "HYBRID_SHARD"}
        assert plugin.sharding_strategy.name == names[plan.zero]
        return
    assert plugin.reshard_after_forward is (plan.zero != "2")
    assert sizes is not None
    assert (sizes.tp_size, sizes.cp_size, sizes.data_parallel_size) == (plan.tp, plan.cp, plan.dp)
    assert sizes.total_size == plan.num_gpus
    if plan.cp > 1:
        assert sizes.cp_handler.cp_comm_strategy == ROTATE_METHODS[plan.cp_comm_type]
    assert sizes.dp_replicate_size == (plan.dp * plan.cp // plan.hsdp_shard if plan.zero == "hsdp" else 1)
