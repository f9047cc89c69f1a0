"""Importing config.json: what each family's fields become, what real files leave out, and every kind of bad input."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simllm.errors import InputError, UnsupportedError
from simllm.models import Model, catalog
from simllm.models.config import read_config, spec_from_config
from simllm.models.families import FAMILIES, model_types
from simllm.models.families.fields import REQUIRED
from simllm.models.spec import MambaSpec, MoESpec, NormSpec

CONFIGS = {path.stem: json.loads(path.read_text()) for path in (Path(catalog.__file__).parent / "configs").glob("*")}

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
}


def spec(base, **changes):
    config = {**(CONFIGS[base] if isinstance(base, str) else base), **changes}
    return spec_from_config({key: value for key, value in config.items() if value is not ...}, "m")


def first(base, **changes):
    return spec(base, **changes).decoder.layers[0]


def windows(model):
    return [block.mixer.sliding_window for block in model.decoder.layers]


# -- what the fields become ----------------------------------------------------------------------------------------


def test_key_value_heads_default_to_heads_in_llama_and_to_eight_in_mistral():
    assert first(LLAMA).mixer.num_key_value_heads == 32
    assert first(LLAMA, num_key_value_heads=None).mixer.kind == "MHA"
    mistral = {**LLAMA, "model_type": "mistral"}
    assert first(mistral).mixer.num_key_value_heads == 8
    assert first(mistral, num_key_value_heads=None).mixer.num_key_value_heads == 32
    assert first({**LLAMA, "model_type": "phi3"}).mixer.num_key_value_heads == 32


def test_a_missing_window_is_the_default_and_null_is_none():
    mistral = {**LLAMA, "model_type": "mistral"}
    assert windows(spec(mistral)) == [4096] * 4
    assert windows(spec(mistral, sliding_window=None)) == [None] * 4
    assert windows(spec({**LLAMA, "model_type": "mixtral"})) == [None] * 4


def test_llama_biases_and_own_head_dim():
    block = first(LLAMA, attention_bias=True, mlp_bias=True, head_dim=64)
    assert (block.mixer.qkv_bias, block.mixer.out_bias, block.mlp.bias) == (True, True, True)
    assert block.mixer.head_dim == 64
    assert first(LLAMA, head_dim=None).mixer.head_dim == 128


def test_gpt2_has_learned_positions_biases_everywhere_and_dropout():
    model = spec("gpt2")
    block = model.decoder.layers[0]
    assert model.decoder.positions == 1024
    assert (block.mixer.position, block.mixer.qkv_bias, block.mixer.out_bias, block.mlp.bias) == ("none", *[True] * 3)
    assert (block.mlp.intermediate_size, block.mlp.activation, block.mlp.gated) == (3072, "gelu_new", False)
    assert (model.hidden_dropout, model.attention_dropout) == (0.1, 0.1)
    assert model.decoder.final_norm == NormSpec(kind="layernorm", bias=True)
    assert spec("gpt2", resid_pdrop=0.0, attn_pdrop=0).hidden_dropout == 0
    assert first("gpt2", n_inner=1000).mlp.intermediate_size == 1000


def test_gpt1_is_post_norm_without_a_final_norm():
    model = spec("openai-gpt")
    assert model.decoder.layers[0].norm_placement == "post"
    assert model.decoder.final_norm is None


def test_gpt_neo_writes_out_its_attention_types():
    config = {
        "model_type": "gpt_neo",
        "vocab_size": 100,
        "hidden_size": 64,
        "num_layers": 4,
        "num_heads": 4,
        "window_size": 16,
        "attention_types": [[["global", "local"], 2]],
    }
    assert windows(spec(config)) == [None, 16, None, 16]
    assert windows(spec(config, attention_types=...)) == [None, 16, None, 16]
    assert windows(spec(config, attention_types=[[["local"], 3], [["global"], 1]])) == [16, 16, 16, None]
    assert (first(config).mixer.qkv_bias, first(config).mixer.out_bias) == (False, True)
    with pytest.raises(InputError, match="describes 2 layers, num_layers=4"):
        spec(config, attention_types=[[["global", "local"], 1]])
    with pytest.raises(InputError, match="repetitions"):
        spec(config, attention_types=["global"])


def test_opt_350m_projects_its_embedding_and_has_no_final_norm():
    model = spec("opt-350m")
    assert (model.embedding_size, model.decoder.positions, model.decoder.final_norm) == (512, 2050, None)
    assert model.decoder.layers[0].norm_placement == "post"
    assert spec("opt-125m").embedding_size is None
    assert spec("opt-125m").decoder.final_norm is not None
    assert spec("opt-125m", _remove_final_layer_norm=True).decoder.final_norm is None


def test_galactica_has_neither_biases_nor_norm_weights():
    block = first("galactica-6.7b")
    assert block.norm == NormSpec(kind="layernorm", affine=False)
    assert (block.mixer.qkv_bias, block.mixer.out_bias, block.mlp.bias) == (False, False, False)


def test_bloom_spellings_of_the_hub():
    hub = {"model_type": "bloom", "vocab_size": 250880, "n_embed": 1024, "n_layer": 2, "num_attention_heads": 16}
    own = {"model_type": "bloom", "vocab_size": 250880, "hidden_size": 1024, "n_layer": 2, "n_head": 16}
    assert spec(hub) == spec(own)
    assert spec(hub, seq_length=2048).context_length == 2048
    assert spec(hub).decoder.embedding_norm == NormSpec(kind="layernorm", bias=True)
    assert first(hub).mixer.position == "alibi"


def test_falcon_generations():
    old, new = first("falcon-7b"), first("falcon-40b")
    assert (old.mixer.kind, old.parallel, old.shared_norm) == ("MQA", True, True)
    assert (new.mixer.num_key_value_heads, new.parallel, new.shared_norm) == (8, True, False)
    # The old decoder does not read num_kv_heads; Falcon2-11B has the new decoder with one norm.
    assert first("falcon-7b", num_kv_heads=71).mixer.num_key_value_heads == 1
    assert first("falcon-40b", num_ln_in_parallel_attn=1).shared_norm
    rw = first("falcon-7b", multi_query=False, alibi=True, bias=True, parallel_attn=False)
    assert (rw.mixer.kind, rw.mixer.position, rw.mixer.qkv_bias, rw.parallel) == ("MHA", "alibi", True, False)
    assert spec("falcon-7b").head.tied


def test_parallel_blocks_and_their_norms():
    assert (first("gpt-j-6b").parallel, first("gpt-j-6b").shared_norm) == (True, True)
    assert (first("pythia-1b").parallel, first("pythia-1b").shared_norm) == (True, False)
    assert not first("pythia-1b", use_parallel_residual=False).parallel
    assert spec("gpt-j-6b").head.bias
    assert (first("gpt-j-6b").mixer.qkv_bias, first("gpt-j-6b").mlp.bias) == (False, True)


def test_qwen_generations():
    assert first("qwen-7b").mlp.intermediate_size == 11008  # the config says 22016
    assert (first("qwen-7b").mixer.qkv_bias, first("qwen-7b").mixer.out_bias) == (True, False)
    assert first("qwen-7b", no_bias=False).mlp.bias
    assert (first("qwen2-7b").mixer.qkv_bias, first("qwen2-7b").mixer.out_bias) == (True, False)
    qwen3 = first("qwen3-8b")
    assert (qwen3.mixer.qkv_bias, qwen3.mixer.qk_norm, qwen3.mixer.qk_norm_per_head) == (
        False,
        NormSpec(kind="rmsnorm"),
        True,
    )
    with pytest.raises(InputError, match="must be even"):
        spec("qwen-7b", intermediate_size=22017)


def test_qwen2_windows_begin_at_max_window_layers():
    on = spec("qwen2-0.5b", use_sliding_window=True, sliding_window=512, max_window_layers=21)
    assert windows(on) == [None] * 21 + [512] * 3
    assert windows(spec("qwen2-0.5b", sliding_window=512, max_window_layers=21)) == [None] * 24


def test_qwen2_moe_layers_shared_expert_and_gate():
    config = {**LLAMA, "model_type": "qwen2_moe", "num_attention_heads": 16, "num_key_value_heads": 16}
    model = spec(config, num_experts=8, num_experts_per_tok=2, decoder_sparse_step=2, mlp_only_layers=[3])
    assert [isinstance(block.mlp, MoESpec) for block in model.decoder.layers] == [False, True, False, False]
    moe = model.decoder.layers[1].mlp
    assert (moe.shared.intermediate_size, moe.shared_gate, moe.expert.intermediate_size) == (5632, True, 1408)
    # transformers 5 writes 0 for "no window".
    assert windows(spec(config, sliding_window=0, use_sliding_window=False)) == [None] * 4


def test_gemma_generations():
    assert (first("gemma-2b").mixer.kind, first("gemma-2b").mixer.head_dim) == ("MQA", 256)
    assert first("gemma-2b", hidden_act="gelu", hidden_activation=None).mlp.activation == "gelu_pytorch_tanh"
    assert first("gemma-2-2b").norm_placement == "sandwich"
    assert windows(spec("gemma-2-2b"))[:4] == [4096, None, 4096, None]
    gemma3 = spec("gemma-3-4b-text")
    assert windows(gemma3)[:12] == ([1024] * 5 + [None]) * 2
    assert gemma3.decoder.layers[0].mixer.qk_norm == NormSpec(kind="rmsnorm")
    assert windows(spec("gemma-3-4b-text", sliding_window_pattern=2))[:4] == [1024, None, 1024, None]
    own = ["full_attention"] * 33 + ["sliding_attention"]
    assert windows(spec("gemma-3-4b-text", layer_types=own)) == [None] * 33 + [1024]


def test_multimodal_gemma_3_means_the_defaults_it_leaves_out():
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}}
    model = spec(config)
    assert model.decoder == spec("gemma-3-4b-text").decoder
    assert model.vocab_size == 262208
    assert any("vision" in note for note in model.notes)
    with pytest.raises(InputError, match="text_config is missing"):
        spec({"model_type": "gemma3"})


def test_chatglm_generations_are_told_apart_by_their_keys():
    old, new = spec("chatglm-6b"), spec("chatglm2-6b")
    assert (old.architecture, old.head.tied, old.decoder.layers[0].mlp.gated) == ("prefix-decoder", True, False)
    assert old.decoder.layers[0].norm == NormSpec(kind="layernorm", bias=True)
    assert (new.architecture, new.head.tied, new.decoder.layers[0].mlp.gated) == ("causal-decoder", False, True)
    assert (new.vocab_size, new.decoder.layers[0].mixer.num_key_value_heads) == (65024, 2)
    assert spec("chatglm2-6b", vocab_size=64794).vocab_size == 65024  # the padded one is stored
    assert (new.decoder.layers[0].mixer.qkv_bias, new.decoder.layers[0].mixer.out_bias) == (True, False)
    assert first("chatglm2-6b", multi_query_attention=False).mixer.kind == "MHA"
    assert spec("chatglm2-6b", post_layer_norm=False).decoder.final_norm is None
    with pytest.raises(InputError, match=r"inner_hidden_size .* or ffn_hidden_size"):
        spec("chatglm-6b", inner_hidden_size=...)


def test_baichuan_says_that_its_positions_are_assumed():
    assert first("baichuan-13b").mixer.position == "alibi"
    assert first("baichuan2-7b").mixer.position == "rope"
    assert "assumed" in spec("baichuan-13b").notes[0]


def test_olmo_norms():
    assert not first("olmo-1b").norm.affine
    block = first("olmo-2-7b")
    assert (block.norm_placement, block.mixer.qk_norm_per_head) == ("output", False)


def test_deepseek_latent_attention_dense_layers_and_shared_experts():
    model = spec("deepseek-v3")
    latent, blocks = model.decoder.layers[0].mixer.latent, model.decoder.layers
    assert (latent.q_lora_rank, latent.kv_lora_rank, latent.v_head_dim) == (1536, 512, 128)
    assert blocks[0].mixer.head_dim == 192
    assert [isinstance(block.mlp, MoESpec) for block in blocks[:5]] == [False] * 3 + [True] * 2
    assert blocks[3].mlp.shared.intermediate_size == 2048
    assert any("multi-token-prediction" in note for note in model.notes)
    lite = spec("deepseek-v2-lite")
    assert lite.decoder.layers[0].mixer.latent.q_lora_rank is None
    assert lite.decoder.layers[1].mlp.shared.intermediate_size == 2 * 1408
    assert first("deepseek-v2-lite", q_lora_rank=...).mixer.latent.q_lora_rank == 1536
    sparse = [isinstance(b.mlp, MoESpec) for b in spec("deepseek-v2-lite", moe_layer_freq=2).decoder.layers[:5]]
    assert sparse == [False, False, True, False, True]


def test_kimi_k2_is_read_as_deepseek_v3():
    assert spec("deepseek-v3", model_type="kimi_k2").decoder == spec("deepseek-v3").decoder


def test_gpt_oss_sinks_biases_and_windows():
    block = first("gpt-oss-20b")
    assert (block.mixer.sinks, block.mixer.qkv_bias, block.mixer.out_bias) == (True, True, True)
    assert (block.mlp.router_bias, block.mlp.expert.bias, block.mlp.expert.gated) == (True, True, True)
    assert windows(spec("gpt-oss-20b"))[:3] == [128, None, 128]


def test_nested_configs_of_mosaic():
    dbrx = first("dbrx")
    assert (dbrx.mixer.num_key_value_heads, dbrx.mlp.num_experts, dbrx.mlp.num_experts_per_tok) == (8, 16, 4)
    assert (dbrx.mlp.expert.intermediate_size, dbrx.norm.bias) == (10752, False)
    mpt = first("mpt-7b", attn_config={"attn_pdrop": 0.25})
    assert (mpt.mixer.position, mpt.mlp.intermediate_size) == ("alibi", 16384)
    assert spec("mpt-7b", attn_config={"attn_pdrop": 0.25}).attention_dropout == 0.25
    assert spec("mpt-7b", attn_config=...) == spec("mpt-7b")


def test_t5_defaults_of_real_files():
    real = {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
    }
    model = spec(real)
    assert (len(model.encoder.layers), len(model.decoder.layers), model.head.tied) == (6, 6, True)
    assert (model.hidden_dropout, model.decoder.relative_attention_num_buckets) == (0.1, 32)
    assert not spec(real, model_type="mt5").head.tied
    block = model.decoder.layers[0]
    assert (block.mixer.mask, block.mixer.position, block.mixer.qkv_bias) == ("causal", "relative", False)
    assert (block.cross_attention.mask, block.cross_attention.position) == ("cross", "none")
    assert model.encoder.layers[0].mixer.mask == "bidirectional"
    assert (block.mlp.activation, block.mlp.gated) == ("relu", False)
    gated = first(real, feed_forward_proj="gated-gelu").mlp
    assert (gated.activation, gated.gated) == ("gelu_new", True)
    assert len(spec(real, num_decoder_layers=2).decoder.layers) == 2


def test_umt5_gives_every_layer_its_own_bias_table():
    model = spec("mt5-small", model_type="umt5")
    assert model.decoder.relative_attention_num_buckets == 0
    assert {block.mixer.relative_attention_num_buckets for block in model.decoder.layers} == {32}
    assert model.decoder.layers[0].cross_attention.relative_attention_num_buckets == 0


def test_switch_has_experts_in_the_second_of_every_step_layers():
    sparse = [isinstance(block.mlp, MoESpec) for block in spec("switch-base-8").encoder.layers]
    assert sparse == [False, True] * 6
    assert all(isinstance(block.mlp, MoESpec) for block in spec("switch-c-2048").decoder.layers)
    assert spec("switch-base-8").encoder.layers[1].mlp.num_experts_per_tok == 1
    with pytest.raises(InputError, match="more than the 12 layers"):
        spec("switch-base-8", num_sparse_encoder_layers=13)


def test_bart_stacks_may_differ():
    model = spec("bart-base", encoder_layers=3, decoder_layers=2, encoder_ffn_dim=100, encoder_attention_heads=4)
    assert (len(model.encoder.layers), len(model.decoder.layers)) == (3, 2)
    assert model.encoder.layers[0].mlp.intermediate_size == 100
    assert model.encoder.layers[0].mixer.num_attention_heads == 4
    assert model.decoder.layers[0].cross_attention.num_attention_heads == 12
    assert (model.encoder.positions, model.decoder.positions, model.decoder.final_norm) == (1026, 1026, None)
    assert spec("bart-base", model_type="mbart").encoder.final_norm is not None


def test_encoders_keep_their_prediction_head():
    bert, roberta = spec("bert-base-uncased"), spec("roberta-base")
    assert bert.head.transform == NormSpec(kind="layernorm", bias=True)
    assert (bert.head.tied, bert.head.bias, bert.decoder.type_vocab_size) == (True, True, 2)
    assert (bert.context_length, roberta.context_length, roberta.decoder.positions) == (512, 512, 514)
    assert bert.decoder.layers[0].mixer.mask == "bidirectional"


def test_jamba_periods():
    blocks = spec("jamba-v0.1").decoder.layers
    assert [index for index, block in enumerate(blocks) if not isinstance(block.mixer, MambaSpec)] == [4, 12, 20, 28]
    assert [index for index, block in enumerate(blocks) if isinstance(block.mlp, MoESpec)] == list(range(1, 32, 2))
    assert blocks[0].mixer.inner_norm == NormSpec(kind="rmsnorm")
    assert first("jamba-v0.1", mamba_dt_rank="auto").mixer.dt_rank == 256
    assert not any(
        isinstance(b.mlp, MoESpec) for b in spec("jamba-v0.1", num_experts=1, num_experts_per_tok=1).decoder.layers
    )


def test_mamba_rank_is_a_sixteenth_rounded_up():
    config = {"model_type": "mamba", "vocab_size": 100, "hidden_size": 40, "num_hidden_layers": 2}
    mixer = first(config, time_step_rank="auto").mixer
    assert (mixer.dt_rank, mixer.inner_size, mixer.state_size, mixer.conv_kernel) == (3, 80, 16, 4)
    assert first(config).mlp is None
    with pytest.raises(InputError, match='or "auto"'):
        spec(config, time_step_rank="automatic")


def test_llama_4_patterns():
    config = {**LLAMA, "model_type": "llama4_text", "hidden_size": 5120, "num_attention_heads": 40}
    model = spec(config, interleave_moe_layer_step=2, attention_chunk_size=64)
    assert [isinstance(block.mlp, MoESpec) for block in model.decoder.layers] == [False, True, False, True]
    assert [block.mixer.position for block in model.decoder.layers] == ["rope", "rope", "rope", "none"]
    assert windows(model) == [64, 64, 64, None]
    assert [block.mixer.mask for block in model.decoder.layers] == ["chunked"] * 3 + ["causal"]
    assert model.decoder.layers[0].mixer.qk_norm == NormSpec(kind="rmsnorm", affine=False)


def test_transformer_xl_and_relative_positions_of_unreleased_models():
    assert first("gopher-280b").mixer.position == "transformer-xl"
    assert spec("lamda-137b").decoder.relative_attention_num_buckets == 32
    assert [isinstance(block.mlp, MoESpec) for block in spec("glam-64b-64e").decoder.layers[:4]] == [False, True] * 2


def test_quantisation_is_a_note():
    model = spec(LLAMA, quantization_config={"quant_method": "awq", "bits": 4})
    assert "awq" in model.notes[0]
    assert Model(model).parameters == Model(spec(LLAMA)).parameters


def test_equal_layers_are_one_object():
    blocks = spec("gemma-3-27b-text").decoder.layers
    assert len({id(block) for block in blocks}) == 2


# -- bad input -----------------------------------------------------------------------------------------------------


def test_reading_files_that_are_no_configs(tmp_path):
    def refused(match, path):
        with pytest.raises(InputError, match=match):
            read_config(path)

    refused("there is no file", tmp_path / "config.json")
    refused("holds no config.json", tmp_path)
    file = tmp_path / "config.json"
    file.write_text("{'model_type': 'llama'}")
    refused("is not JSON", file)
    file.write_text("")
    refused("is not JSON", file)
    file.write_text('{"hidden_size": NaN}')
    refused("NaN is not a number", file)
    file.write_text("[1, 2]")
    refused("holds a JSON list", file)
    file.write_text("null")
    refused("holds a JSON null", tmp_path)
    file.write_text("[" * 100_000)
    refused("nested too deeply|is not JSON", file)
    file.write_bytes(b"\xff\xfe\x00weights")
    refused("not text in UTF-8", file)
    file.write_text(" " * (5 * 2**20))
    refused("too long", file)
    file.unlink()
    os.mkfifo(file)
    refused("not a regular file", tmp_path)
    refused("cannot read", tmp_path / ("x" * 300))


@pytest.mark.skipif(os.getuid() == 0, reason="permissions do not bind root")
def test_an_unreadable_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text("{}")
    file.chmod(0)
    with pytest.raises(InputError, match="cannot read"):
        read_config(file)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": ...}, "has no model_type; known: .*llama"),
        ({"model_type": 7}, "has model_type=7"),
        ({"model_type": ""}, "has model_type=''"),
        ({"model_type": "lama"}, r"did you mean llama.*hidden_size=4096.*Known families, .* Qwen3 \(qwen3\)"),
        ({"model_type": "zzz"}, "unknown model_type 'zzz'.*Fields understood: hidden_size=4096"),
        ({"hidden_size": ...}, r"\(model_type 'llama'\): the needed field hidden_size is missing"),
        ({"hidden_size": None}, "the needed field hidden_size is null"),
        ({"hidden_size": "4096"}, "hidden_size='4096' cannot be used; expected a whole number"),
        ({"hidden_size": True}, "hidden_size=True cannot be used"),
        ({"hidden_size": float("nan")}, "hidden_size=nan cannot be used"),
        ({"hidden_size": float("inf")}, "hidden_size=inf cannot be used"),
        ({"hidden_size": 4096.5}, "hidden_size=4096.5 cannot be used"),
        ({"hidden_size": [4096]}, r"hidden_size=\[4096\] cannot be used"),
        ({"hidden_size": 0}, "hidden_size=0 is out of range"),
        ({"hidden_size": -4096}, "hidden_size=-4096 is out of range"),
        ({"hidden_size": 10**18}, "hidden_size=1000000000000000000 is out of range"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000 is out of range"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is out of range"),
        ({"vocab_size": -1}, "vocab_size=-1 is out of range"),
        ({"max_position_embeddings": "8k"}, "max_position_embeddings='8k'"),
        ({"num_attention_heads": 33}, "num_attention_heads=33 does not divide hidden_size=4096"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5 does not divide num_attention_heads=32"),
        ({"num_key_value_heads": 64}, "num_key_value_heads=64 does not divide num_attention_heads=32"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' cannot be used; expected true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 cannot be used"),
        ({"attention_dropout": 1.5}, "attention_dropout=1.5 cannot be used"),
        ({"attention_dropout": "0.1"}, "attention_dropout='0.1'"),
        ({"hidden_act": 3}, "hidden_act=3 cannot be used"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads=.* is not modelled"),
    ],
)
def test_bad_llama_configs(changes, match):
    with pytest.raises(InputError, match=match):
        spec(LLAMA, **changes)


@pytest.mark.parametrize(
    ("base", "changes", "match"),
    [
        ("mixtral-8x7b", {"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than num_local_experts=8"),
        ("mixtral-8x7b", {"num_local_experts": 0}, "num_local_experts=0 is out of range"),
        ("dbrx", {"ffn_config": {"moe_num_experts": 2, "moe_top_k": 4}}, "ffn_config.moe_top_k=4 is more than"),
        ("dbrx", {"attn_config": "grouped"}, "attn_config='grouped' cannot be used; expected an object"),
        ("bloom-7b1", {"n_embed": 1024}, "hidden_size=4096 and n_embed=1024 mean the same field"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True is not modelled"),
        ("mpt-7b", {"no_bias": False}, "no_bias=False is not modelled"),
        ("mpt-7b", {"attn_config": {"attn_type": "multiquery_attention"}}, "attn_config.attn_type=.* is not modelled"),
        ("bert-base-uncased", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("gemma-2-2b", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 26 layers"),
        ("gemma-2-2b", {"layer_types": ["linear_attention"] * 26}, "'linear_attention' is not modelled"),
        ("gemma-2-2b", {"layer_types": "full_attention"}, "layer_types='full_attention' cannot be used"),
        ("falcon-7b", {"num_attention_heads": 70}, "num_attention_heads=70 does not divide hidden_size=4544"),
        ("bart-base", {"decoder_attention_heads": 7}, "decoder_attention_heads=7 does not divide d_model=768"),
        ("qwen3-30b-a3b", {"mlp_only_layers": [0.5]}, r"mlp_only_layers=\[0.5\]"),
        ("chatglm2-6b", {"multi_query_group_num": 3}, "multi_query_group_num|num_key_value_heads"),
    ],
)
def test_bad_configs_of_other_families(base, changes, match):
    with pytest.raises(InputError, match=match):
        spec(base, **changes)


def test_what_is_understood_but_not_modelled_has_its_own_kind_of_error():
    with pytest.raises(UnsupportedError):
        spec("mpt-7b", no_bias=False)


def test_a_text_model_inside_an_unknown_one_is_pointed_out():
    with pytest.raises(InputError, match=r"text_config .*'llama'.* can be given as a config of its own"):
        spec({"model_type": "llava", "text_config": LLAMA})


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_types[0] + family.marker)
def test_every_needed_field_is_named_when_it_is_missing(family):
    """An empty config: the first field without a default is asked for, under a spelling of the family."""
    config = {"model_type": family.model_types[0], **({family.marker: 64} if family.marker else {})}
    if family.nested:
        config[family.nested] = {}
    needed = [name for field in family.table.values() if field.default is REQUIRED for name in field.names]
    with pytest.raises(InputError, match="the needed field") as caught:
        spec_from_config(config, "m")
    assert any(name in str(caught.value) for name in needed)


def test_every_model_type_of_the_catalog_is_registered():
    assert {config["model_type"] for config in CONFIGS.values()} <= set(model_types())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_value_makes_anything_but_a_spec_or_a_clear_error(data):
    name = data.draw(st.sampled_from(sorted(CONFIGS)))
    config = dict(CONFIGS[name])
    key = data.draw(st.sampled_from(sorted(config)))
    config[key] = data.draw(JSON)
    try:
        found = spec_from_config(config, name)
    except InputError as error:
        message = str(error)
    else:
        assert found.num_hidden_layers >= 1
        assert found.vocab_size >= 1
        message = "a spec"
    assert message
    assert "\n" not in message


# -- further families and their traps ------------------------------------------------------------------------------


def test_remote_code_spellings_mean_the_same_model():
    llama = {**LLAMA, "num_key_value_heads": 4}
    assert spec(llama, model_type="Yi").decoder == spec(llama).decoder
    stable = {**LLAMA, "model_type": "stablelm"}
    assert spec(stable, model_type="stablelm_epoch").decoder == spec(stable).decoder
    internlm = first(LLAMA, model_type="internlm3", bias=True, qkv_bias=False)
    assert (internlm.mixer.qkv_bias, internlm.mixer.out_bias, internlm.mlp.bias) == (False, True, True)


def test_olmo_of_the_training_code():
    own = {
        "model_type": "hf_olmo",
        "vocab_size": 50280,
        "embedding_size": 50304,
        "d_model": 2048,
        "n_layers": 2,
        "n_heads": 16,
        "mlp_ratio": 8,
        "activation_type": "swiglu",
        "rope": True,
        "include_bias": False,
        "layer_norm_with_affine": False,
        "weight_tying": True,
        "max_sequence_length": 2048,
    }
    published = spec("olmo-1b", num_hidden_layers=2)
    model = spec(own)
    assert model.vocab_size == 50304
    assert model.decoder.layers[0].mlp == published.decoder.layers[0].mlp
    assert model.decoder.layers[0].norm == published.decoder.layers[0].norm
    assert model.decoder.positions == 0
    assert spec(own, rope=False).decoder.positions == 2048
    assert first(own, layer_norm_with_affine=True, bias_for_layer_norm=False).norm == NormSpec(kind="layernorm")
    assert first(own, multi_query_attention=True).mixer.kind == "MQA"
    plain = first(own, activation_type="gelu").mlp
    assert (plain.gated, plain.intermediate_size) == (False, 16384)
    with pytest.raises(UnsupportedError, match="block_type='llama' is not modelled"):
        spec(own, block_type="llama")


def test_first_mpt_normalises_queries_and_keys():
    config = {"model_type": "mosaic_gpt", "vocab_size": 50432, "d_model": 2048, "n_heads": 16, "n_layers": 24}
    model = Model(spec(config, attn_qk_ln=True))
    assert model.parameters.total - Model(spec(config)).parameters.total == 24 * 2 * 2048
    assert model.parameters.total == 50432 * 2048 + 24 * (12 * 2048**2 + 4 * 2048) + 2048
    assert first(config, mlp_ratio=2).mlp.intermediate_size == 4096


def test_sinusoidal_families_have_no_position_tables():
    xglm = {
        "model_type": "xglm",
        "vocab_size": 100,
        "d_model": 64,
        "num_layers": 2,
        "attention_heads": 4,
        "ffn_dim": 128,
    }
    assert (spec(xglm).decoder.positions, spec(xglm).decoder.sinusoidal) == (0, True)
    nllb = {"model_type": "m2m_100", "vocab_size": 100, "d_model": 64}
    model = spec(nllb)
    assert model.encoder.sinusoidal
    assert (model.encoder.embedding_norm, model.encoder.final_norm) == (None, NormSpec(kind="layernorm", bias=True))
    assert Model(model).parameters.embedding == 6400
    assert not spec("bart-base").encoder.sinusoidal


def test_exaone_turns_only_in_local_layers():
    config = {**LLAMA, "model_type": "exaone4", "num_hidden_layers": 8}
    blocks = spec(config).decoder.layers
    assert [block.mixer.position for block in blocks] == ["rope", "rope", "rope", "none"] * 2
    assert windows(spec(config)) == [4096, 4096, 4096, None] * 2
    assert {block.mixer.position for block in spec(config, sliding_window=None).decoder.layers} == {"rope"}
    assert blocks[0].norm_placement == "output"


def test_switch_steps_of_the_config_win():
    def sparse(**changes):
        return [isinstance(block.mlp, MoESpec) for block in spec("switch-base-8", **changes).encoder.layers]

    assert sum(sparse(encoder_sparse_step=4)) == 3
    assert not any(sparse(encoder_sparse_step=0))
    assert sparse(encoder_sparse_step=None) == sparse()


@pytest.mark.parametrize(
    ("base", "changes", "match"),
    [
        ("mpt-7b", {"expansion_ratio": 3}, "expansion_ratio=3 is not modelled"),
        ("bert-base-uncased", {"tie_word_embeddings": False}, "tie_word_embeddings=False is not modelled"),
        ("roberta-base", {"tie_word_embeddings": False}, "tie_word_embeddings=False is not modelled"),
        ("gpt2", {"attention_head_type": "multiquery"}, "attention_head_type='multiquery' is not modelled"),
        (
            {
                **LLAMA,
                "model_type": "dots1",
                "moe_intermediate_size": 64,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
            },
            {"max_window_layers": 2},
            "sliding windows of dots.llm1",
        ),
    ],
)
def test_what_no_class_would_follow_is_refused_by_name(base, changes, match):
    with pytest.raises(UnsupportedError, match=match):
        spec(base, **changes)


def test_further_mixtures():
    deepseek = {**LLAMA, "model_type": "deepseek", "moe_intermediate_size": 64, "n_routed_experts": 4}
    model = spec(deepseek, num_experts_per_tok=2, n_shared_experts=2, first_k_dense_replace=1)
    assert [isinstance(block.mlp, MoESpec) for block in model.decoder.layers] == [False, True, True, True]
    assert model.decoder.layers[1].mlp.shared.intermediate_size == 128
    assert model.decoder.layers[0].mixer.kind == "MHA"
    phimoe = spec({**LLAMA, "model_type": "phimoe"}, lm_head_bias=True, attention_bias=True)
    assert (phimoe.head.bias, phimoe.decoder.layers[0].norm.kind) == (True, "layernorm")
    falcon_mamba = first({"model_type": "falcon_mamba", "vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1})
    assert falcon_mamba.mixer.inner_norm == NormSpec(kind="rmsnorm", affine=False)
    v2 = {**CONFIGS["deepseek-v2-lite"], "num_hidden_layers": 2}
    assert spec(v2, mlp_bias=True).decoder.layers[1].mlp.shared.bias
    v2.pop("n_shared_experts")
    assert spec(v2).decoder.layers[1].mlp.shared.intermediate_size == 2 * 1408
