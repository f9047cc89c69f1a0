"""From the cells of a row to a model, a stack, a cluster and a plan."""

import pytest

from simllm.errors import InputError
from simllm.hardware.stack import load_stack
from simllm.models import Model
from simllm.models.spec import AttentionSpec, MLPSpec, MoESpec
from simllm.validation.row_model import check_parameters, model_spec
from simllm.validation.row_plan import run_cluster, run_plan
from simllm.validation.row_stack import (
    base_stack,
    capacity_of,
    check_task,
    dropout_of,
    run_stack,
    state_what_is_not_modelled,
)
from simllm.validation.table import Row


def row_of(good, **cells) -> Row:
    return Row(line=2, cells={**good, **cells})


def plan_of(row: Row):
    base = base_stack(row)
    seq_len = row.needed_integer("seq_len")
    model = Model(model_spec(row, seq_len, dropout_of(row, base)))
    return run_plan(row, model, run_cluster(row), run_stack(row, base), base, seq_len)


GPT = {
    "model_family": "gpt",
    "model_name": "GPT-3.6B",
    "params_b": "3.6",
    "layers": "30",
    "hidden": "3072",
    "ffn_hidden": "12288",
    "heads": "32",
    "kv_heads": "32",
    "head_dim": "96",
    "vocab": "51200",
    "gated_mlp": "0",
    "tied_embeddings": "1",
    "seq_len": "2048",
}
MOE = {"n_experts": "8", "top_k": "2", "moe_ffn_hidden": "14336", "model_family": "moe", "params_b": ""}


class TestModel:
    def test_the_published_count_of_a_llama(self, good):
        spec = model_spec(row_of(good), 8192, 0.0)
        assert Model(spec).parameters.total == 8_030_261_248

    def test_a_two_matrix_mlp_is_gpt_like(self, good):
        row = row_of(good, **GPT)
        spec = model_spec(row, 2048, 0.1)
        block = spec.decoder.layers[0]
        assert (block.norm.kind, block.norm.bias) == ("layernorm", True)
        assert block.mlp == MLPSpec(intermediate_size=12288, activation="gelu", bias=True)
        assert (block.mixer.position, block.mixer.qkv_bias) == ("none", True)
        assert (spec.decoder.positions, spec.head.tied, spec.hidden_dropout) == (2048, True, 0.1)
        # 12 L h^2 + 13 L h + (V + s) h + 2 h: Narayanan 2021 (arXiv:2104.04473), equation 2.
        count = 12 * 30 * 3072**2 + 13 * 30 * 3072 + (51200 + 2048) * 3072 + 2 * 3072
        assert Model(spec).parameters.total == count
        assert any("LayerNorm" in sentence for sentence in row.assumptions)

    def test_mpt_rows_count_as_their_source_does(self, good):
        cells = {**GPT, "layers": "32", "hidden": "4096", "heads": "32", "kv_heads": "32", "head_dim": "128"}
        cells |= {"ffn_hidden": "16384", "vocab": "50368", "model_family": "mpt", "model_name": "mpt-7b"}
        total = Model(model_spec(row_of(good, **cells), 512, 0.0)).parameters.total
        assert round(total / 1e9, 6) == 6.652568  # as printed in the llm-foundry benchmarks

    def test_nemotron_and_qwen3_are_what_their_shape_does_not_tell(self, good):
        nemotron = model_spec(
            row_of(good, **GPT, **{"tp": "1"})
            if False
            else row_of(good, **{**GPT, "model_family": "nemotron", "kv_heads": "8"}),
            2048,
            0.0,
        )
        block = nemotron.decoder.layers[0]
        assert (block.norm.kind, block.mlp.activation, block.mlp.bias) == ("layernorm", "relu2", False)
        assert block.mixer.position == "rope"
        assert nemotron.decoder.positions == 0
        qwen = model_spec(row_of(good, model_name="Qwen3_235B_a22B", hidden="4224"), 8192, 0.0)
        assert qwen.decoder.layers[0].mixer.qk_norm.kind == "rmsnorm"

    def test_a_catalog_model_of_the_same_sizes_gives_the_components(self, good):
        cells = {
            **MOE,
            "model_name": "DeepSeek-V3",
            "layers": "61",
            "hidden": "7168",
            "ffn_hidden": "18432",
            "heads": "128",
            "kv_heads": "128",
            "head_dim": "",
            "vocab": "129280",
            "n_experts": "256",
            "top_k": "8",
            "moe_ffn_hidden": "2048",
        }
        row = row_of(good, **cells)
        spec = model_spec(row, 4096, 0.0)
        assert Model(spec).parameters.total == 671_026_404_352
        assert spec.decoder.layers[0].mixer.latent is not None
        assert "deepseek-v3 in the catalog, of the same sizes" in row.assumptions[0]
        # Four layers of it, one of them dense, as the notes say.
        few = row_of(good, **{**cells, "layers": "4", "notes": "SP on; dense_layers=1; MoE capacity factor 1"})
        kinds = [type(block.mlp) for block in model_spec(few, 4096, 0.0).decoder.layers]
        assert kinds == [MLPSpec, MoESpec, MoESpec, MoESpec]
        assert "of the same sizes but for the 4 layers" in few.assumptions[0]

    def test_the_experts_of_the_row_replace_those_of_the_catalog(self, good):
        cells = {**MOE, "model_name": "GPT OSS 120B", "layers": "36", "hidden": "2880", "ffn_hidden": "2880"}
        cells |= {"heads": "64", "kv_heads": "8", "head_dim": "64", "vocab": "201088"}
        cells |= {"n_experts": "128", "top_k": "4", "moe_ffn_hidden": "2880"}
        spec = model_spec(row_of(good, **cells), 4096, 0.0)
        assert Model(spec).parameters.total == pytest.approx(116.8e9, rel=1e-3)
        windows = [block.mixer.sliding_window for block in spec.decoder.layers[:4]]
        assert windows == [128, None, 128, None]

    def test_a_row_without_vocabulary_never_borrows_a_catalog_model(self, good):
        cells = {
            **GPT,
            "hidden": "4096",
            "head_dim": "128",
            "ffn_hidden": "16384",
            "vocab": "",
        }  # the sizes of BLOOM 7B1
        row = row_of(good, **cells)
        assert model_spec(row, 2048, 0.0).vocab_size == 50257
        assert "vocab is not stated: 50257, that of GPT-2" in row.assumptions

    def test_a_framework_whose_script_names_its_tokeniser(self, good):
        cells = dict.fromkeys(("vocab", "tied_embeddings"), "")
        row = row_of(good, **{**GPT, **cells}, framework="Megatron-LM + zero-bubble, schedule ZB-2p")
        spec = model_spec(row, 2048, 0.0)
        assert (spec.vocab_size, spec.head.tied) == (32000, False)
        assert "vocab is not stated: 32000, that of SentencePiece" in row.assumptions
        stated = row_of(good, **{**GPT, "vocab": "50304"}, framework="Megatron-LM + zero-bubble, schedule ZB-2p")
        assert model_spec(stated, 2048, 0.0).vocab_size == 50304

    def test_what_is_not_stated_is_assumed_in_words(self, good):
        empty = dict.fromkeys(("kv_heads", "head_dim", "vocab", "tied_embeddings", "gated_mlp", "ffn_hidden"), "")
        row = row_of(good, **{**GPT, **empty})
        spec = model_spec(row, 2048, 0.0)
        mixer = spec.decoder.layers[0].mixer
        assert isinstance(mixer, AttentionSpec)
        assert (mixer.num_key_value_heads, mixer.head_dim) == (32, 96)
        assert spec.decoder.layers[0].mlp.intermediate_size == 4 * 3072
        for sentence in (
            "head_dim is not stated: hidden / heads = 96",
            "kv_heads is not stated: one for every query head",
            "tied_embeddings is not stated: tied",
            "ffn_hidden is not stated: four times hidden",
            "the MLP is taken as two matrices, which the row does not state",
        ):
            assert sentence in row.assumptions

    @pytest.mark.parametrize(
        ("cells", "says"),
        [
            ({"layers": ""}, "layers is not stated"),
            ({"heads": "48", "head_dim": ""}, "heads=48 does not divide hidden=4096"),
            ({"kv_heads": "5"}, "kv_heads=5 does not divide heads=32"),
            ({"ffn_hidden": ""}, "a gated MLP has no usual width"),
            ({"n_experts": "8"}, "n_experts=8 needs top_k"),
            ({"n_experts": "8", "top_k": "9"}, "top_k=9 is more than n_experts=8"),
            ({"layers": "20000"}, "must be from 1 to 10000"),
        ],
    )
    def test_models_that_cannot_be(self, good, cells, says):
        with pytest.raises(InputError, match=says):
            model_spec(row_of(good, vocab="999", **cells), 8192, 0.0)

    def test_parameters_that_contradict_the_columns(self, good):
        wrong = row_of(good, params_b="7.0")
        check_parameters(wrong, Model(model_spec(wrong, 8192, 0.0)))
        assert wrong.assumptions[-1].endswith("but params_b=7; the columns decide")
        sparse = row_of(good, **{**MOE, "params_b": "20"})
        with pytest.raises(InputError, match=r"a model of 47\.5 billion parameters, but params_b=20"):
            check_parameters(sparse, Model(model_spec(sparse, 8192, 0.0)))


class TestStack:
    @pytest.mark.parametrize(
        ("framework", "cells", "name"),
        [
            ("Megatron-Core (MCore)", {}, "megatron-core"),
            ("Megatron-LM", {"flash_attention": "0"}, "megatron-lm"),
            ("Megatron-LM", {"flash_attention": "1.0"}, "megatron-core"),
            ("Megatron-LM (TE 2.11)", {}, "megatron-core"),
            ("Megatron-DeepSpeed", {}, "megatron-deepspeed"),
            ("Megatron-Bridge (Megatron-Core)", {}, "megatron-bridge"),
            ("llm-foundry/Composer (PyTorch FSDP)", {}, "fsdp1"),
            ("fms-fsdp (PyTorch FSDP1)", {}, "fsdp1-compiled"),
            ("torchtitan", {"overlap_notes": "FSDP2 prefetch; FSDP+compile"}, "torchtitan"),
            ("torchtitan", {"overlap_notes": "FSDP2 prefetch; FSDP"}, "torchtitan-eager"),
            ("torchtitan", {}, "torchtitan"),
            ("MaxText (JAX/XLA)", {}, "xla"),
            ("nobody's framework", {}, "megatron-core"),
            ("", {}, "megatron-core"),
        ],
    )
    def test_the_longest_prefix_decides(self, good, framework, cells, name):
        assert base_stack(row_of(good, framework=framework, **cells)) == name

    def test_a_framework_in_no_stack_is_an_assumption(self, good):
        row = row_of(good, framework="nanotron")
        base_stack(row)
        assert row.assumptions == ["framework 'nanotron' is in no stack; megatron-core stands in"]

    def test_stated_attention_beats_the_stack(self, good):
        assert run_stack(row_of(good, flash_attention="0"), "megatron-core").kernels.attention == "unfused"
        assert run_stack(row_of(good, flash_attention="3"), "megatron-core").kernels.attention == "flash3"
        assert run_stack(row_of(good, flash_attention="1.0"), "megatron-deepspeed").kernels.attention == "best"
        assert run_stack(row_of(good, flash_attention="1.0"), "fsdp1") is load_stack("fsdp1")

    def test_stated_overlap_beats_the_stack(self, good):
        def exposed(notes: str, name: str) -> float:
            return run_stack(row_of(good, overlap_notes=notes), name).overlap.tensor_parallel_exposed.si

        overlapped = load_stack("nemo").overlap.tensor_parallel_exposed.si
        backward_only = load_stack("megatron-core").overlap.tensor_parallel_exposed.si
        assert overlapped < backward_only < 1
        assert exposed("grad/param-sync overlap, p2p overlap; TP communication overlap on", "nemo") == overlapped
        assert exposed("grad/param-sync overlap, p2p overlap", "nemo") == backward_only
        assert exposed("TP comm overlap / DP overlap per config_common.sh", "nemo") == overlapped
        assert exposed("TP comm overlap off", "nemo") == backward_only
        assert exposed("", "nemo") == overlapped
        assert exposed("compile; per-op SAC; async TP", "torchtitan") == overlapped
        assert exposed("compile; per-op SAC; vanilla TP", "torchtitan") == 1

    def test_a_run_without_any_overlap(self, good):
        row = row_of(good, overlap_notes="non-overlap contract: TP comm overlap off, no overlap-p2p; CP via a2a")
        stack = run_stack(row, "megatron-core")
        assert {getattr(stack.overlap, name).si for name in stack.overlap.__struct_fields__} == {1}
        state_what_is_not_modelled(row)
        assert row.assumptions == [
            "the settings exclude overlap: all communication shows",
        ]

    def test_the_kind_of_context_parallelism_is_as_stated_or_as_the_stack_has_it(self, good):
        def kind(stack: str, **cells: str) -> tuple[str, list[str]]:
            row = row_of(good, **({"cp": "2", "dp": "", "grad_accum": ""} | cells))
            cluster = run_cluster(row)
            plan = run_plan(row, Model.load("llama-3-8b"), cluster, load_stack(stack), stack, 4096)
            return plan.cp_comm_type, [text for text in row.assumptions if "context parallelism" in text]

        assert kind("megatron-core", overlap_notes="non-overlap contract; CP via a2a") == ("a2a", [])
        assert kind("megatron-core", notes="DeepSpeed Ulysses") == ("a2a", [])
        assert kind("megatron-core", notes="CP by all-gather") == ("all_gather", [])
        said = "the kind of context parallelism is not stated: all_gather, as torchtitan does"
        assert kind("torchtitan") == ("all_gather", [said])
        assert kind("torchtitan", cp="1") == ("p2p", [])

    def test_bytes_on_the_wire_as_stated(self, good):
        pure = run_stack(row_of(good, overlap_notes="PyTorch FSDP1 prefetch; MP Mode=PURE"), "fsdp1")
        default = run_stack(row_of(good, overlap_notes="PyTorch FSDP1 prefetch; MP Mode=DEFAULT"), "fsdp1")
        assert (pure.states.gradient_on_wire.si, default.states.gradient_on_wire.si) == (2, 4)
        fp8 = run_stack(
            row_of(good, overlap_notes="TP communication overlap on; FP8 primary weights (fp8_params)"), "nemo"
        )
        assert fp8.states.gathered_parameter.si == 1

    @pytest.mark.parametrize(
        ("cells", "fused"),
        [
            ({"source": "docs/performance-summary.md [26.06 NeMo Container]"}, True),
            ({"source": "docs/performance-summary.md [26.06.01 NeMo Container]"}, True),
            ({"notes": "27.02 NeMo Container; Pre-Training Performance"}, True),
            ({"source": "docs/performance-summary.md [26.04 NeMo Container]"}, False),
            ({"source": "docs/performance-summary.md [26.06 NeMo Container]", "precision": "bf16"}, False),
            ({"source": "docs/performance-summary.md [26.06 NeMo Container]", "gpu": "h100-sxm"}, False),
            ({}, False),
        ],
    )
    def test_experts_in_one_kernel_since_2606(self, good, cells, fused):
        row = row_of(good, **{"gpu": "gb200", "precision": "mxfp8", **cells})
        stack = run_stack(row, "megatron-bridge")
        assert (stack.costs.expert_launch is None, stack.costs.expert_wait is None) == (fused, fused)
        assert stack.kernels.expert_extras == ("fused" if fused else "eager")
        assert run_stack(row, "nemo") == load_stack("nemo")

    def test_dropout_is_that_of_the_old_megatron_frameworks(self, good):
        assert dropout_of(row_of(good), "megatron-deepspeed") == 0.1
        assert dropout_of(row_of(good), "nemo") == 0

    def test_only_full_training_and_lora(self, good):
        with pytest.raises(InputError, match="task=qlora is not modelled"):
            check_task(row_of(good, task="QLoRA"))
        check_task(row_of(good, task=""))
        check_task(row_of(good, task="LoRA"))

    @pytest.mark.parametrize(
        ("cells", "factor"),
        [
            ({"model_name": "Qwen3_30B_a3B (tokendrop)"}, 1.0),
            ({"notes": "capacity factor 1.25, pad-to-capacity"}, 1.25),
            ({"notes": "token-drop capacity factor 1. dp = derived"}, 1.0),
            ({"model_name": "DeepSeekV3 (dropless)", "notes": "all benchmarks are token-dropless"}, None),
            ({}, None),
        ],
    )
    def test_capacity_as_stated(self, good, cells, factor):
        row = row_of(good, **cells)
        assert capacity_of(row) == factor
        assert len(row.assumptions) == (factor is not None)

    def test_multi_token_prediction_is_only_missing_where_it_was_on(self, good):
        on, off = row_of(good, notes="MTP presumably on"), row_of(good, model_name="DeepSeekV3 (w/o MTP)")
        for row in (on, off):
            state_what_is_not_modelled(row)
        assert on.assumptions == ["layers for multi-token prediction are not priced"]
        assert off.assumptions == []


class TestCluster:
    def test_stated_nodes_and_network(self, good):
        row = row_of(good, node_network_GBps="50.0", interconnect="4 x 100Gb RoCE inter-node")
        cluster = run_cluster(row)
        assert (cluster.num_nodes, cluster.scaleout_bandwidth_per_node, cluster.scaleout_link) == (2, 50e9, "roce")
        assert row.assumptions == []

    def test_what_the_reference_system_says_is_an_assumption(self, good):
        row = row_of(good, node_network_GBps="", gpus_per_node="")
        cluster = run_cluster(row)
        assert (cluster.gpus_per_node, cluster.scaleout_bandwidth_per_node) == (8, 400e9)
        assert row.assumptions == [
            "gpus_per_node is not stated: 8, as in the device's reference system",
            "node_network_GBps is not stated: 400, as in the device's reference system",
        ]

    def test_an_nvl72_is_one_domain(self, good):
        cluster = run_cluster(row_of(good, gpu="gb200", n_gpus="64", gpus_per_node="4", node_network_GBps=""))
        assert cluster.num_domains == 1

    def test_unknown_devices(self, good):
        with pytest.raises(InputError, match="unknown accelerator 'h1000-sxm'; did you mean h100-sxm"):
            run_cluster(row_of(good, gpu="h1000-sxm"))
        with pytest.raises(InputError, match="gpu is not stated"):
            run_cluster(row_of(good, gpu=""))


class TestPlan:
    def test_everything_stated(self, good):
        row = row_of(good)
        plan = plan_of(row)
        assert (plan.tp, plan.pp, plan.vpp, plan.cp, plan.dp, plan.zero) == (2, 1, 1, 1, 8, "1")
        assert (plan.micro_batch_size, plan.global_batch_size, plan.sequence_parallel) == (1, 64, True)
        assert (str(plan.recompute), plan.precision, plan.schedule) == ("none", "bf16", "1f1b")

    def test_nothing_stated_is_assumed_in_words(self, good):
        names = ("pp", "vp", "cp", "ep", "dp", "zero", "sequence_parallel", "recompute", "precision", "grad_accum")
        row = row_of(good, **dict.fromkeys(names, ""))
        plan = plan_of(row)
        assert (plan.pp, plan.cp, plan.dp, plan.zero, plan.sequence_parallel) == (1, 1, 8, "1", True)
        for sentence in (
            "pp is not stated: 1",
            "cp is not stated: 1",
            "zero is not stated: 1, as megatron-core does",
            "sequence_parallel is not stated: on, as megatron-core does",
            "recompute is not stated: none, as megatron-core does",
            "precision is not stated: bf16",
        ):
            assert sentence in row.assumptions

    def test_precision_of_a_device_without_bf16(self, good):
        cells = {**GPT, "gpu": "v100-sxm-32gb", "precision": "", "tp": "1", "dp": "16", "grad_accum": "4"}
        assert plan_of(row_of(good, **cells, framework="Megatron-LM")).precision == "fp16"

    @pytest.mark.parametrize(
        ("framework", "precision"),
        [("Megatron-LM", "fp16"), ("Megatron-DeepSpeed", "fp16"), ("Megatron-LM (TE)", "bf16"), ("torchtitan", "bf16")],
    )
    def test_precision_that_is_not_stated(self, good, framework, precision):
        row = row_of(good, **{**GPT, "precision": "", "flash_attention": ""}, framework=framework)
        assert plan_of(row).precision == precision

    def test_the_pipeline(self, good):
        cells = {"pp": "4", "dp": "2", "grad_accum": "32"}
        assert plan_of(row_of(good, **cells, vp="2")).schedule == "interleaved"
        assert plan_of(row_of(good, **cells, vp="2", pipeline_schedule="1f1b-i")).vpp == 2
        plain = row_of(good, **cells, vp="", pipeline_schedule="")
        assert plan_of(plain).schedule == "1f1b"
        assert "vp is not stated: 1, not interleaved" in plain.assumptions

    def test_layers_that_do_not_divide(self, good):
        # 32 layers on 5 stages: 7, 7, 7, 7, 4; the embedding and the head do not make it even.
        row = row_of(good, pp="5", n_gpus="80", dp="8", vocab="999")
        assert plan_of(row).uneven_layers
        assert "32 layers over 5 pipeline chunks: the last chunks are shorter" in row.assumptions
        # On 11 stages the embedding counts as a layer.
        assert not plan_of(row_of(good, pp="11", n_gpus="176", dp="8", vocab="999")).uneven_layers

    def test_recomputation_of_the_stacks(self, good):
        gpu = plan_of(row_of(good, framework="MaxText (JAX/XLA)", recompute="")).recompute
        assert {"qkv", "down"}.isdisjoint(gpu.operators)
        assert {"attention_core", "o", "gate_up", "act"} <= set(gpu.operators)
        assert str(plan_of(row_of(good, framework="Paxml (JAX)", recompute="")).recompute) == "full"
        assert str(plan_of(row_of(good, framework="MaxText (JAX/XLA)", recompute="selective")).recompute) == "full"
        assert plan_of(row_of(good, recompute="selective")).recompute.kind == "selective"
        titan = plan_of(row_of(good, framework="torchtitan", recompute="selective")).recompute
        assert titan.operators == ("mixer_norm", "k", "rope", "o", "mlp_norm", "up", "act")

    def test_experts_follow_the_tensor_parallel_ranks_where_the_framework_does_that(self, good):
        cells = {**MOE, "ep": "4"}
        assert plan_of(row_of(good, **cells, framework="Megatron-Bridge (Megatron-Core)")).etp == 1
        assert plan_of(row_of(good, **cells, framework="NeMo (Megatron-Core)")).etp == 2
        # 16 ranks of a stage, 16 experts groups: nothing is left for tensor parallelism.
        full = plan_of(row_of(good, **{**MOE, "ep": "16", "n_experts": "16"}, framework="NeMo (Megatron-Core)"))
        assert full.etp == 1

    def test_batches_follow_from_each_other(self, good):
        assert plan_of(row_of(good, global_batch_seqs="")).global_batch_size == 64
        assert plan_of(row_of(good, micro_batch="", grad_accum="4")).micro_batch_size == 2
        alone = row_of(good, micro_batch="", grad_accum="")
        assert plan_of(alone).micro_batch_size == 1
        assert "micro_batch is not stated: 1" in alone.assumptions

    @pytest.mark.parametrize(
        ("cells", "says"),
        [
            ({"dp": "4"}, "= 8 contradicts n_gpus=16"),
            ({"tp": "3", "dp": ""}, "= 3 does not divide n_gpus=16"),
            ({"tp": "", "pp": "", "dp": ""}, "how 16 GPUs are used is not known"),
            ({"grad_accum": "7"}, "contradicts global_batch_seqs=64"),
            ({"grad_accum": "", "micro_batch": "3"}, "micro_batch_size=3 does not divide"),
            ({"grad_accum": "", "global_batch_seqs": ""}, "global_batch_seqs is not stated"),
            ({"pipeline_schedule": "zb-3p"}, "pipeline schedule zb-3p is not modelled"),
            ({"pipeline_schedule": "1f1b", "pp": "4", "vp": "2", "dp": "2", "grad_accum": "32"}, "contradicts vp=2"),
            (
                {"pipeline_schedule": "interleaved", "pp": "4", "vp": "", "dp": "2", "grad_accum": "32"},
                "needs vp, the model chunks of a rank",
            ),
            ({"zero": "4"}, "zero='4' is none of"),
            ({"ep": "2"}, "ep=2, but the model has no experts"),
            ({"recompute": "some"}, "unknown recompute policy 'some'"),
            ({"precision": "fp7"}, "unknown precision 'fp7'"),
        ],
    )
    def test_plans_that_cannot_be(self, good, cells, says):
        with pytest.raises(InputError, match=says):
            plan_of(row_of(good, **cells))


def test_a_system_that_the_interconnect_names_is_used(good):
    row = row_of(good, gpu="a100-sxm-80gb", n_gpus="16", interconnect="NVLink intra; 4x Omni-Path links (Jean Zay)")
    assert run_cluster(row).name == "jean-zay-a100"
    assert any("jean-zay-a100" in sentence for sentence in row.assumptions)
    other = row_of(good, gpu="h100-sxm", n_gpus="16", interconnect="NVLink intra (Jean Zay)")
    assert run_cluster(other).name == "h100-sxm cluster"


def test_optimizer_states_sharded_in_groups(good):
    shared = {"zero": "1", "overlap_notes": "ZeRO-1 sharded within 2 GPUs (zero1=2)"}
    assert plan_of(row_of(good, **shared)).hsdp_shard == 2
    assert plan_of(row_of(good, zero="1")).hsdp_shard == 0
