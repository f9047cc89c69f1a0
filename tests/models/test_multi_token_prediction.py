"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2) and the padded vocabulary, from load to ranks."""

from __future__ import annotations

import pytest

from simllm.errors import InputError
from simllm.models import Model
from simllm.models.config import spec_from_config
from simllm.models.graph import Implementation, Layout
from simllm.parallel.stages import pipeline_stages, stage_weights

SMALL = {
    "model_type": "deepseek_v3",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
}


def small(modules: int, tied: bool = False) -> Model:
    config = {**SMALL, "num_nextn_predict_layers": max(modules, 1), "tie_word_embeddings": tied}
    return Model.from_config(config, mtp=modules > 0)


def test_parameters_of_deepseek_v3() -> None:
    plain, model = Model.load("deepseek-v3"), Model.load("deepseek-v3", mtp=True)
    hidden, experts, width = 7168, 256, 2048
    attention = hidden * 1536 + 1536 + 1536 * 128 * 192 + hidden * 576 + 512 + 512 * 128 * 256 + 128 * 128 * hidden
    layer = attention + 2 * hidden + 3 * hidden * width * (experts + 1) + hidden * experts
    around = 2 * hidden * hidden + 3 * hidden  # the projection, two norms before it, one before the head
    assert model.parameters.total == plain.parameters.total + layer + around == 671_026_404_352 + 11_610_067_968
    assert model.parameters.multi_token_prediction == layer + around
    assert plain.parameters.multi_token_prediction == 0
    assert sum(model.parameters.by_component.values()) == model.parameters.total
    chosen = 3 * hidden * width * (experts - 8)
    assert model.parameters.active == plain.parameters.active + layer + around - chosen
    # Tables and head are the model's own; the checkpoint holds a copy of each.
    assert model.parameters.embedding == plain.parameters.embedding == 129280 * hidden
    assert f"stores {2 * 129280 * hidden:,} parameters more" in model.spec.notes[-1]
    assert model.components["multi_token_prediction"] == "1 module"


def test_flops_are_those_of_one_more_layer_a_projection_and_a_head() -> None:
    plain, model, seq = small(0), small(1), 128
    layer = plain.graph.layers[-1]
    one = sum(item.flops for op in layer.operators for item in op.forward(Layout(seq_len=seq), Implementation()))
    more = model.flops(seq).forward_full_attention - plain.flops(seq).forward_full_attention
    assert more == one + 2 * seq * 2 * 64 * 64 + 2 * seq * 64 * 1000


def test_the_cache_of_plain_generation_stays() -> None:
    assert small(1).kv_cache_bytes_per_token() == small(0).kv_cache_bytes_per_token()


def test_a_module_repeats_the_last_layer() -> None:
    graph = small(2).graph
    assert graph.last_layers == (graph.layers[-1],) * 2
    assert [extra.name for extra in graph.last_extras] == [
        "multi-token prediction stem",
        "multi-token prediction head",
    ] * 2
    assert len(graph.layers) == 4
    assert sum(times for _, times in graph.layer_parts) == 6


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("modules", [0, 1, 2])
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_modules_are_on_the_last_pipeline_rank_with_one_copy_of_the_table(tied: bool, modules: int, pp: int) -> None:
    model = small(modules, tied)
    stages = pipeline_stages(model.graph, pp, 1)
    assert [stage.num_layers for stage in stages] == [4 // pp] * (pp - 1) + [4 // pp + modules]
    last = [extra.name for extra in stages[-1].extras]
    assert last[-1] == "head"
    assert sum(name.startswith("multi-token") for name in last) == 2 * modules
    held = sum(sum(stage_weights(stage, Layout(), pp)) for stage in stages)
    # A pipeline's last rank needs the token table for a tied head or for the modules, and needs it once.
    copies = int(pp > 1 and (tied or modules > 0))
    assert held == model.parameters.total + copies * 1000 * 64


def test_who_has_modules() -> None:
    assert "--mtp" in Model.load("deepseek-v3").spec.notes[-1]
    with pytest.raises(InputError, match="no num_nextn_predict_layers above zero"):
        Model.load("llama-3-8b", mtp=True)
    with pytest.raises(InputError, match="num_nextn_predict_layers=-1 is out of range"):
        Model.from_config({**SMALL, "num_nextn_predict_layers": -1}, mtp=True)
    spec = spec_from_config({**SMALL, "num_nextn_predict_layers": None}, "m")
    assert spec.notes == ()


def test_padded_vocabulary() -> None:
    plain, padded = Model.load("gpt2"), Model.load("gpt2", vocab_multiple=128)
    # Megatron-LM and nanoGPT: 50257 to 50304, a tied table of 768 columns.
    assert padded.spec.padded_vocab_size == 50304
    assert padded.parameters.total - plain.parameters.total == 47 * 768
    assert padded.flops(1024).forward_masked - plain.flops(1024).forward_masked == 2 * 1024 * 768 * 47
    assert Model.load("gpt2", vocab_multiple=128 * 8).spec.padded_vocab_size == 51200
    assert "50257 padded to 50304" in padded.spec.notes[-1]
    even = Model.load("llama-2-7b", vocab_multiple=128)
    assert even.parameters == Model.load("llama-2-7b").parameters
    assert even.spec.notes == ()
