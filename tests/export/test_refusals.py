"""Plans that a framework cannot run, and files that cannot be understood, are refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simllm.errors import InputError, UnsupportedError
from simllm.export import Imported, accelerate, deepspeed, export, megatron_reading, read_settings, torchtitan_reading
from tests.export.jobs import job

NO_SP = {"tp": 2, "dp": 4}


@pytest.mark.parametrize(
    ("framework", "plan", "training", "words"),
    [
        ("deepspeed", {"pp": 2, "dp": 4}, {}, ["pp=2", "PipelineModule"]),
        ("deepspeed", {"cp": 2, "dp": 4}, {}, ["cp_comm_type=p2p with cp=2", "Ulysses"]),
        ("deepspeed", {"cp": 2, "dp": 2, "cp_comm_type": "a2a", **NO_SP}, {}, ["cp=2 with tp=2", "AutoTP"]),
        ("torchtitan", {"cp": 2, "dp": 4, "zero": "3", "cp_comm_type": "a2a"}, {}, ["a2a", "all_gather and p2p"]),
        ("accelerate", {"cp": 2, "dp": 4, "zero": "3", "cp_comm_type": "a2a"}, {}, ["a2a", "all_gather and p2p"]),
        (
            "megatron",
            {"cp": 2, "dp": 4, "name": "mistral-7b"},
            {"seq_len": 8192},
            ["window of 4096", "all_gather or a2a"],
        ),
        ("megatron", {"cp": 16, "dp": 1, "cp_comm_type": "a2a"}, {}, ["16 ranks with 8 key-value heads", "a2a+p2p"]),
        ("deepspeed", {"tp": 2, "dp": 4, "sequence_parallel": True}, {}, ["sequence_parallel", "AutoTP"]),
        ("deepspeed", {"zero": "3", **NO_SP}, {}, ["tp=2", "zero=3"]),
        ("deepspeed", {"zero": "hsdp", "hsdp_shard": 4}, {}, ["MiCS"]),
        ("deepspeed", {"precision": "fp8"}, {}, ["precision=fp8", "bf16"]),
        ("deepspeed", {"zero": "0"}, {"gradient_precision": "fp32"}, ["gradient_precision=fp32 in bf16 with zero=0"]),
        ("deepspeed", {}, {"optimizer": "adam-8bit"}, ["optimizer=adam-8bit"]),
        ("deepspeed", {}, {"capacity_factor": 1.25}, ["capacity_factor=1.25", "MoE layers"]),
        ("torchtitan", {"zero": "3"}, {"gradient_clipping": False}, ["without gradient clipping", "max_norm"]),
        ("torchtitan", {"zero": "3"}, {"capacity_factor": 1.0}, ["capacity_factor=1", "every token"]),
        ("accelerate", {"zero": "3"}, {"capacity_factor": 1.0}, ["capacity_factor=1"]),
        ("torchtitan", {"zero": "1"}, {}, ["zero=1", "zero=0, 2 or 3"]),
        ("torchtitan", {"zero": "3", **NO_SP}, {}, ["tp=2", "sequence parallel"]),
        ("torchtitan", {"zero": "3", "precision": "fp16"}, {}, ["precision=fp16"]),
        ("torchtitan", {"zero": "3", "recompute": "selective"}, {}, ["recompute=selective", "every:N"]),
        ("torchtitan", {"zero": "hsdp", "hsdp_shard": 8}, {}, ["one group"]),
        ("accelerate", {"zero": "1"}, {}, ["zero=1"]),
        ("accelerate", {"zero": "3", "pp": 2, "dp": 4}, {}, ["pp=2", "no pipeline"]),
        ("accelerate", {"zero": "3", **NO_SP}, {"stack": "fsdp1"}, ["FSDP 1", "--stack torchtitan"]),
        ("megatron", {"schedule": "gpipe", "pp": 2, "dp": 4}, {}, ["schedule=gpipe", "1F1B"]),
        ("megatron", {"precision": "tf32"}, {}, ["precision=tf32"]),
        ("megatron", {"zero": "3", "pp": 2, "dp": 4}, {}, ["zero=3 with pp=2"]),
        ("megatron", {"recompute": "every:5"}, {}, ["every:5", "32 layers"]),
        ("megatron", {"recompute": "list:o"}, {}, ["list:o", "layernorm"]),
        ("megatron", {}, {"optimizer": "muon"}, ["muon", "zero=1"]),
        ("megatron", {}, {"master_weights": False}, ["master weights"]),
        ("megatron", {"cp": 2, "dp": 4}, {"seq_len": 4098}, ["cp=2", "seq_len=4098"]),
    ],
)
def test_what_a_framework_cannot_run(
    framework: str, plan: dict[str, Any], training: dict[str, Any], words: list[str]
) -> None:
    from simllm.models.activations import Recompute

    if "recompute" in plan:
        plan = plan | {"recompute": Recompute.parse(plan["recompute"])}
    with pytest.raises(UnsupportedError) as caught:
        export(job(training=training, **plan), framework)
    for word in ("cannot express", *words):
        assert word in str(caught.value)


def test_experts_of_torchtitan_follow_tp_without_ep() -> None:
    plan = {"zero": "3", "tp": 2, "dp": 4, "sequence_parallel": True}
    with pytest.raises(UnsupportedError, match="etp=1 with tp=2 and ep=1"):
        export(job("deepseek-v3", **plan), "torchtitan")
    text = export(job("deepseek-v3", etp=2, **plan), "torchtitan").text
    assert torchtitan_reading.read(text).settings["etp"] == 2
    silent = text.replace("expert_tensor_parallel_degree = 2\n", "")
    assert torchtitan_reading.read(silent).settings["etp"] == 2


def test_models_that_torchtitan_does_not_have() -> None:
    with pytest.raises(UnsupportedError, match="none of its models has this shape"):
        export(job("mixtral-8x7b", zero="3"), "torchtitan")
    with pytest.raises(UnsupportedError, match="cannot pipeline this model"):
        export(job("qwen3-8b", zero="3", pp=2, dp=4), "torchtitan")


def test_a_setting_that_no_exporter_knows_is_not_dropped() -> None:
    chosen = job()
    with pytest.raises(UnsupportedError, match="precision=fp16: has no counterpart"):
        replace(chosen, plan=replace(chosen.plan, precision="fp16")).require_known(
            "a tool", ["dp", "global_batch_size"]
        )


MODEL = "--num-layers 8 --hidden-size 1024 --num-attention-heads 16 --vocab-size 32000 --max-position-embeddings 4096"


@pytest.mark.parametrize(
    ("read", "text", "words"),
    [
        (megatron_reading.read, "", ["no argument"]),
        (megatron_reading.read, "--tensor-model-paralel-size 8", ["did you mean tensor-model-parallel-size"]),
        (megatron_reading.read, "--tensor-model-parallel-size", ["--tensor-model-parallel-size has no value"]),
        (megatron_reading.read, "--tensor-model-parallel-size two", ["two is not a number"]),
        (megatron_reading.read, "--tensor-model-parallel-size -2", ["must be above zero"]),
        (megatron_reading.read, "--tensor-model-parallel-size $TP", ["variable of a script"]),
        (megatron_reading.read, "--bf16 true", ["switch", "true"]),
        (megatron_reading.read, "--bf16 --fp16", ["contradict"]),
        (megatron_reading.read, "tensor-model-parallel-size 8", ["begin with --"]),
        (megatron_reading.read, "--num-layers 8", ["--hidden-size", "--vocab-size"]),
        (megatron_reading.read, "--optimizer-cpu-offload", ["host memory", "not modelled"]),
        (megatron_reading.read, "--moe-expert-capacity-factor 1.0", ["capacity"]),
        (megatron_reading.read, f"{MODEL} --multi-latent-attention", ["--qk-layernorm"]),
        (megatron_reading.read, "--cp-comm-type ulysses", ["--cp-comm-type", "all_gather"]),
        (
            megatron_reading.read,
            "--context-parallel-size 8 --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2",
            ["--hierarchical-context-parallel-sizes A B", "cp=8"],
        ),
        (megatron_reading.read, "--recompute-granularity selective --recompute-modules mlp", ["mlp", "core_attn"]),
        (megatron_reading.read, f"{MODEL} --pipeline-model-parallel-layout Et|tttttttL", ["1, 7"]),
        (megatron_reading.read, f"{MODEL} --moe-layer-freq ([1]*9) --num-experts 4", ["9 layers"]),
        (megatron_reading.read, f"{MODEL} --moe-layer-freq __import__('os') --num-experts 4", ["not understood"]),
        (
            megatron_reading.read,
            "--use-megatron-fsdp --num-distributed-optimizer-instances 2 "
            "--data-parallel-sharding-strategy optim_grads_params",
            ["--gpus"],
        ),
        (deepspeed.read, "{", ["not JSON"]),
        (deepspeed.read, "[]", ["one JSON object"]),
        (deepspeed.read, '{"train_batch_size": 8, "train_batch_size": 16}', ["twice"]),
        (deepspeed.read, '{"train_batchsize": 8}', ["did you mean train_batch_size"]),
        (deepspeed.read, '{"train_batch_size": "8"}', ["whole number"]),
        (deepspeed.read, '{"zero_optimization": {"stage": 4}}', ["0, 1, 2 or 3"]),
        (deepspeed.read, '{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}', ["offload"]),
        (deepspeed.read, '{"zero_optimization": {"zero_hpz_partition_size": 8}}', ["ZeRO++"]),
        (deepspeed.read, '{"bf16": {"enabled": true}, "fp16": {"enabled": true}}', ["both enabled"]),
        (deepspeed.read, '{"sequence_parallel_size": "4"}', ["sequence_parallel_size", "whole number"]),
        (deepspeed.read, '{"optimizer": {"type": "Lamb"}}', ["optimizer.type", "Lamb"]),
        (torchtitan_reading.read, "[training", ["not TOML"]),
        (torchtitan_reading.read, "[model]\nname = 'llama3'\nflavor = '7B'", ["llama3 7B", "did you mean"]),
        (torchtitan_reading.read, "[training]\nbatch_size = 2", ["torchtitan 0.1", "training.local_batch_size"]),
        (torchtitan_reading.read, "[training]\nseq_length = 4096", ["did you mean training.seq_len"]),
        (torchtitan_reading.read, "[training]\nenable_cpu_offload = true", ["enable_cpu_offload"]),
        (torchtitan_reading.read, "[parallelism]\ntensor_parallel_degree = 2", ["--gpus"]),
        (accelerate.read, "a: [", ["not YAML"]),
        (accelerate.read, "3", ["one mapping"]),
        (accelerate.read, "distributed_type: DEEPSPEED", ["DEEPSPEED", "FSDP"]),
        (accelerate.read, "distributed_type: FSDP\nnum_proceses: 8", ["did you mean num_processes"]),
        (accelerate.read, "distributed_type: FSDP\nmixed_precision: bf8", ["bf8", "did you mean fp8"]),
        (
            accelerate.read,
            "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2, fsdp_reshard_after_forward: FULL_SHARD}",
            ["FULL_SHARD", "true"],
        ),
    ],
)
def test_files_that_cannot_be_understood(
    read: Callable[[str, int | None], Imported], text: str, words: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        read(text, None)
    for word in words:
        assert word in str(caught.value)


def test_every_key_that_is_not_used_is_named() -> None:
    notes = "\n".join(megatron_reading.read("--bf16 --lr 1e-4 --seed 1 --tp-comm-overlap --sparkle-level 3").notes)
    assert "without effect on time and memory: lr, seed" in notes
    assert "as the stack megatron-core does, whatever the file says: tp-comm-overlap" in notes
    assert "not known and taken to have no effect on time and memory: sparkle-level" in notes


def test_what_a_trainer_fills_in_is_not_stated() -> None:
    text = """{"bf16": {"enabled": "auto"}, "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "zero_optimization": {"stage": 3}}"""
    found = deepspeed.read(text)
    assert "global_batch_size" not in found.settings
    assert (found.settings["zero"], found.settings["optimizer"]) == ("3", "adam")
    assert any(
        note.startswith("auto, for the trainer") and "bf16.enabled, optimizer.params.lr" in note for note in found.notes
    )


def test_batches_of_deepspeed_follow_from_each_other() -> None:
    for text in (
        '{"train_batch_size": 64, "gradient_accumulation_steps": 4}',
        '{"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}',
        '{"train_micro_batch_size_per_gpu": 2, "train_batch_size": 64}',
    ):
        settings = deepspeed.read(text, 8).settings
        assert (settings["micro_batch_size"], settings["global_batch_size"]) == (2, 64)
    with pytest.raises(InputError, match="is not train_micro_batch_size_per_gpu=2"):
        deepspeed.read(
            '{"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 8}', 8
        )


def test_a_configuration_of_fsdp_1_as_accelerate_writes_it() -> None:
    text = """
distributed_type: FSDP
mixed_precision: 'bf16'
num_processes: 16
fsdp_config:
  fsdp_activation_checkpointing: true
  fsdp_offload_params: false
  fsdp_sharding_strategy: SHARD_GRAD_OP
  fsdp_use_orig_params: true
"""
    settings = accelerate.read(text).settings
    expected = {"zero": "2", "dp": 16, "precision": "bf16", "recompute": "full", "stack": "fsdp1"}
    assert {name: settings[name] for name in expected} == expected


def test_a_script_is_read_like_a_list_of_arguments() -> None:
    script = (
        "#!/bin/bash\n# eight ranks\ntorchrun --nproc-per-node 8 pretrain_gpt.py \\\n"
        "  --tensor-model-parallel-size=4 \\\n  --bf16 --micro-batch-size 2 --global-batch-size 32"
    )
    settings = megatron_reading.read(script).settings
    assert (settings["tp"], settings["micro_batch_size"], settings["precision"]) == (4, 2, "bf16")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--num-layers-per-virtual-pipeline-stage 1 --pipeline-model-parallel-size 4", {"vpp": 2}),
        ("--decoder-last-pipeline-num-layers 2 --pipeline-model-parallel-size 4", {"vpp": 1}),
        ("--recompute-activations", {"recompute": "selective"}),
        (
            "--recompute-granularity full --recompute-method block --recompute-num-layers 2 "
            "--pipeline-model-parallel-size 2",
            {"recompute": "every:2"},
        ),
        ("--use-torch-fsdp2 --torch-fsdp2-no-reshard-after-forward", {"zero": "2"}),
        ("--num-experts 4 --tensor-model-parallel-size 2", {"etp": 2}),
    ],
)
def test_other_words_for_the_same(arguments: str, expected: dict[str, Any]) -> None:
    settings = megatron_reading.read(f"{MODEL} {arguments}").settings
    assert {name: settings[name] for name in expected} == expected


def test_whose_file_it_is_shows_in_its_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="whose file it is"):
        read_settings(tmp_path / "config.ini")
    with pytest.raises(InputError, match="does not exist"):
        read_settings(tmp_path / "config.json")
    file = tmp_path / "ds.json"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        read_settings(file)
