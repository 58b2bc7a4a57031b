"""config.json, read strictly: what is read, what is written, what is refused and how it is named."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from moebius.config import DecoderConfig, DenseMlp, RmsNorm, SoftmaxTopK, SparseMoe, Yarn
from moebius.errors import ConfigError
from moebius.models import FAMILIES, family_of
from tests.families import (
    MOE_FAMILIES,
    TINY,
    UNKNOWN_TO_TRANSFORMERS,
    YARN,
    make_oracle,
    oracle_config,
    save_oracle,
    tiny_config,
)
from tests.models.hub_configs import DEEPSEEK_V3, GLM4, GPT_OSS, MINIMAX_M2, MIXTRAL, QWEN3_MOE, RELEASED

SIZES = [
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "num_local_experts", "num_experts", "num_experts_per_tok"),
    *("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "n_routed_experts"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
]
NO_FIELD_OF_TRANSFORMERS = {"scoring_func", "moe_layer_freq", "use_routing_bias", "rotary_dim"}
LEFT_TO_THE_MODEL = {"architectures", "head_dim"}  # in transformers' configs
SAYS_NOTHING_OF_THE_DECODER = {
    *("max_window_layers", "experts_per_token", "use_mtp", "num_mtp_modules", "mtp_transformer_layers"),
    *("num_nextn_predict_layers", "attn_type_list", "qk_norm_type", "shared_intermediate_size"),
}


def read(raw: Any) -> DecoderConfig:
    return family_of(raw).from_hf(raw)


def mixer(raw: Any) -> Any:
    """How the first layer attends."""
    return read(raw).layers[0].mixer


def faults(raw: dict[str, Any]) -> dict[str, str]:
    """Field -> what was wrong with it."""
    with pytest.raises(ConfigError) as raised:
        read(raw)
    return {fault.where: fault.what for fault in raised.value.faults}


@pytest.mark.parametrize("raw", [*(raw for raw, *_ in RELEASED.values()), *TINY.values()], ids=[*RELEASED, *TINY])
def test_a_config_written_reads_back_the_same(raw):
    config = read(raw)
    written = FAMILIES[config.model_type].to_hf(config)
    assert read(json.loads(json.dumps(written))) == config


@pytest.mark.parametrize("family", TINY)
def test_transformers_reads_what_is_written_as_what_was_read(family):
    raw = tiny_config(family)
    ours, theirs = (oracle_config(given).to_dict() for given in (FAMILIES[family].to_hf(read(raw)), raw))
    for config in (ours, theirs):
        config["rope_parameters"] = {**YARN_DEFAULTS, **without_nulls(config["rope_parameters"])}
    differing = {name for name in theirs if ours.get(name) != theirs[name]}
    assert differing <= {"head_dim", "intermediate_size", *SAYS_NOTHING_OF_THE_DECODER}


YARN_DEFAULTS = {"type": "yarn", "truncate": True}


def without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


@pytest.mark.parametrize("family", sorted(set(TINY) - set(UNKNOWN_TO_TRANSFORMERS)))
def test_what_transformers_saves_reads_the_same(family, tmp_path):
    folder = save_oracle(make_oracle(family), tmp_path)
    assert read(json.loads((folder / "config.json").read_text())) == read(tiny_config(family))


@pytest.mark.parametrize("family", TINY)
def test_an_absent_field_means_what_it_means_in_transformers(family):
    """Only sizes are given; whatever else is written has to be transformers' default."""
    given = tiny_config(family, num_hidden_layers=4)
    sizes = {name: value for name, value in given.items() if name in SIZES}
    if oracle_config(sizes).to_dict().get("n_shared_experts", 0) is None:  # it knows no default either
        assert faults(sizes) == {"n_shared_experts": "missing"}
        sizes["n_shared_experts"] = given["n_shared_experts"]
    ours, theirs = FAMILIES[family].to_hf(read(sizes)), spelled_as_ours(oracle_config(sizes).to_dict())
    judged = ours.keys() - {*SIZES, *LEFT_TO_THE_MODEL, *NO_FIELD_OF_TRANSFORMERS, *SAYS_NOTHING_OF_THE_DECODER}
    judged -= ALWAYS_SAID.get(family, set())
    assert len(judged) > 8
    assert {name: ours[name] for name in judged} == {name: theirs.get(name) for name in judged}


ALWAYS_SAID = {"minimax_m2": {"use_qk_norm"}, "deepseek_v3": {"topk_method"}, "kimi_k2": {"topk_method"}}


def spelled_as_ours(config: dict[str, Any]) -> dict[str, Any]:
    rope = dict(config["rope_parameters"])
    besides = {"rope_theta": rope.pop("rope_theta"), "partial_rotary_factor": rope.get("partial_rotary_factor")}
    groups = {name: config.get(name) or 1 for name in ("n_group", "topk_group")}
    return {**config, **besides, **groups, "rope_scaling": rope, "torch_dtype": None}


def test_a_special_id_that_is_null_is_none_whatever_the_family_has():
    assert read(tiny_config("mixtral", bos_token_id=None, eos_token_id=None)).eos_token_id == ()
    assert read(tiny_config("olmoe", pad_token_id=None)).pad_token_id is None


def test_the_width_of_dense_layers_is_missing_only_where_there_are_some():
    raw = {name: value for name, value in tiny_config("qwen3_moe").items() if name != "intermediate_size"}
    assert read(raw).moe_layers
    assert faults({**raw, "mlp_only_layers": [0]}) == {"intermediate_size": "missing"}


def test_dense_layers_are_written_by_number():
    config = read(tiny_config("qwen3_moe", decoder_sparse_step=2, num_hidden_layers=4))
    kinds = [type(layer.feed_forward) for layer in config.layers]
    assert kinds == [DenseMlp, SparseMoe, DenseMlp, SparseMoe]
    assert FAMILIES["qwen3_moe"].to_hf(config)["mlp_only_layers"] == [0, 2]


@pytest.mark.parametrize(
    ("family", "stranger"),
    [
        ("mixtral", "qwen3_moe"),
        ("qwen2", "mixtral"),
        ("qwen2_moe", "olmoe"),
        ("gpt_oss", "mixtral"),
        ("deepseek_v2", "deepseek_v3"),
        ("deepseek_v3", "glm4_moe"),
        ("glm4_moe", "deepseek_v3"),
        ("minimax_m2", "glm4_moe"),
        ("mixtral", "qwen2"),
    ],
)
def test_a_config_that_a_family_has_no_words_for_is_refused(family, stranger):
    with pytest.raises(ConfigError, match=family):
        FAMILIES[family].to_hf(replace(read(tiny_config(stranger)), model_type=family))


def test_layers_that_differ_are_refused_where_the_family_writes_one_kind():
    config = read(tiny_config("mixtral"))
    first = replace(config.layers[0], feed_forward=replace(config.moe_layers[0], top_k=1))
    with pytest.raises(ConfigError, match="layers: no words for"):
        FAMILIES["mixtral"].to_hf(replace(config, layers=(first, *config.layers[1:])))


def test_both_spellings_are_read():
    renamed = {
        key: value for key, value in QWEN3_MOE.items() if key not in ("num_experts", "rope_theta", "torch_dtype")
    }
    renamed |= {
        "num_local_experts": 128,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "dtype": "bfloat16",
    }
    assert read(renamed) == read(QWEN3_MOE)
    assert read({**QWEN3_MOE, "num_local_experts": 128}) == read(QWEN3_MOE)


def test_rope_is_read_in_every_spelling():
    expected = mixer(tiny_config("deepseek_v3")).rope
    kind = {name: value for name, value in YARN.items() if name != "type"} | {"rope_type": "yarn"}
    for spelled in (
        {"rope_scaling": kind},
        {"rope_scaling": None, "rope_theta": None, "rope_parameters": {**kind, "rope_theta": 10000.0}},
        {"rope_parameters": YARN},
    ):
        assert mixer(tiny_config("deepseek_v3", **spelled)).rope == expected


def test_yarn_stretches_the_length_that_the_config_says_where_it_does_not_say_which():
    raw = tiny_config("qwen3_moe", rope_scaling={"rope_type": "yarn", "factor": 4.0})
    assert mixer(raw).rope.yarn == Yarn(4.0, raw["max_position_embeddings"])


def test_an_mscale_of_zero_is_none():
    zero = mixer(tiny_config("deepseek_v3", rope_scaling={**YARN, "mscale": 0, "mscale_all_dim": 0.0})).rope
    assert (zero.yarn.mscale, zero.yarn.mscale_all_dim) == (None, None)


def test_how_much_of_a_head_turns():
    assert [mixer(raw).rope.rotary_dim for raw in (GLM4, MINIMAX_M2, GPT_OSS)] == [64, 64, 64]
    absent = {name: value for name, value in GLM4.items() if name != "partial_rotary_factor"}
    assert read(absent) == read(GLM4)
    resaved = {**MINIMAX_M2, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}
    assert read(resaved) == read(MINIMAX_M2)


def test_windows_alternate_from_the_first_layer_on():
    layers: Any = read(GPT_OSS).layers
    windows = [layer.mixer.sliding_window for layer in layers]
    assert windows == [128, None] * 12
    assert read({name: value for name, value in GPT_OSS.items() if name != "layer_types"}) == read(GPT_OSS)


def test_dense_layers_come_first():
    kinds = [type(layer.feed_forward) for layer in read(DEEPSEEK_V3).layers]
    assert kinds == [DenseMlp] * 3 + [SparseMoe] * 58


def test_no_groups_is_one_group():
    config = read(tiny_config("deepseek_v3", n_group=None, topk_group=None))
    assert config == read(tiny_config("deepseek_v3", n_group=1, topk_group=1))


def test_null_means_absent():
    raw = {**MIXTRAL, "head_dim": None, "num_key_value_heads": None, "rope_scaling": None, "eos_token_id": None}
    assert mixer(raw).head_dim == 128
    assert mixer(raw).num_key_value_heads == 32
    assert read(raw).eos_token_id == ()


def test_head_dim_is_read_where_it_is_not_the_quotient():
    assert mixer(QWEN3_MOE).head_dim == 128
    assert QWEN3_MOE["hidden_size"] // QWEN3_MOE["num_attention_heads"] == 64


def test_several_ends_are_read():
    assert read({**QWEN3_MOE, "eos_token_id": [151645, 151643]}).eos_token_id == (151645, 151643)


def test_left_over_generation_fields_change_nothing():
    inert = {"top_k": 50, "do_sample": False, "id2label": {"0": "A"}, "auto_map": {"AutoModel": "evil.Model"}}
    assert read({**QWEN3_MOE, **inert}) == read(QWEN3_MOE)


def test_what_qwen3_coder_says_besides_changes_nothing():
    besides = {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}
    assert read({**QWEN3_MOE, **besides}) == read(QWEN3_MOE)


def test_what_the_first_minimax_m2_says_besides_changes_nothing():
    betas = {f"layernorm_{part}_beta": 1.0 for part in ("full_attention", "linear_attention", "mlp")}
    besides = {
        "mlp_intermediate_size": 8192,
        "shared_moe_mode": "sigmoid",
        "swa_rope_theta": -1.0,
        "max_model_len": None,
    }
    assert read({**MINIMAX_M2, **betas, **besides, "attn_window_size": None}) == read(MINIMAX_M2)


def test_absent_norm_topk_prob_means_false():
    raw = {key: value for key, value in QWEN3_MOE.items() if key != "norm_topk_prob"}
    assert read(raw).moe_layers[0].routing == SoftmaxTopK(renormalize=False)


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    # family, changed fields, the field named, what is said
    ("qwen3_moe", {"num_experts": -1}, "num_experts", "value"),
    ("qwen3_moe", {"hidden_size": "x"}, "hidden_size", "value"),
    ("qwen3_moe", {"hidden_size": 64.0}, "hidden_size", "value"),
    ("qwen3_moe", {"hidden_size": True}, "hidden_size", "value"),
    ("qwen3_moe", {"hidden_size": None}, "hidden_size", "missing"),
    ("qwen3_moe", {"num_hidden_layers": 10**12}, "num_hidden_layers", "value"),
    ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok", "value"),
    ("qwen3_moe", {"num_local_experts": 9}, "num_experts", "contradiction"),
    ("qwen3_moe", {"dtype": "bfloat16"}, "torch_dtype", "contradiction"),
    ("qwen3_moe", {"rope_parameters": {"rope_theta": 5.0}}, "rope_theta", "contradiction"),
    ("qwen3_moe", {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.rope_type", "value"),
    ("qwen3_moe", {"rope_scaling": {"rope_type": "yarn"}}, "rope_parameters.factor", "missing"),
    ("qwen3_moe", {"rope_scaling": {**YARN, "rope_type": "default"}}, "rope_parameters.rope_type", "contradiction"),
    ("qwen3_moe", {"rope_scaling": {**YARN, "beta_fast": -1}}, "rope_scaling.beta_fast", "value"),
    ("qwen3_moe", {"rope_scaling": {**YARN, "short_factor": [1.0]}}, "rope_scaling.short_factor", "unknown field"),
    ("qwen3_moe", {"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention", "unknown field"),
    ("qwen3_moe", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling.factor", "unknown field"),
    (
        "qwen3_moe",
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor",
        "unsupported",
    ),
    ("qwen3_moe", {"partial_rotary_factor": 0.5}, "partial_rotary_factor", "unsupported"),
    ("qwen3_moe", {"rope_scaling": {**YARN, "attention_factor": 0}}, "rope_scaling.attention_factor", "value"),
    ("qwen3_moe", {"rope_scaling": "yarn"}, "rope_scaling", "value"),
    ("qwen3_moe", {"rope_theta": 0}, "rope_theta", "value"),
    ("qwen3_moe", {"rms_norm_eps": float("nan")}, "rms_norm_eps", "value"),
    ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window", "unsupported"),
    ("qwen3_moe", {"hidden_act": "gelu"}, "hidden_act", "unsupported"),
    ("qwen3_moe", {"attention_dropout": 0.1}, "attention_dropout", "unsupported"),
    ("qwen3_moe", {"num_key_value_heads": 3}, "num_key_value_heads", "value"),
    ("qwen3_moe", {"head_dim": 31}, "head_dim", "value"),
    ("qwen3_moe", {"mlp_only_layers": [2]}, "mlp_only_layers", "value"),
    ("qwen3_moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers", "value"),
    ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob", "value"),
    ("qwen3_moe", {"torch_dtype": "int8"}, "torch_dtype", "value"),
    ("qwen3_moe", {"torch_dtype": ["float32"]}, "torch_dtype", "value"),
    ("qwen3_moe", {"eos_token_id": -2}, "eos_token_id", "value"),
    ("qwen3_moe", {"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method", "unsupported"),
    ("qwen3_moe", {"architectures": ["Qwen3MoeForSequenceClassification"]}, "architectures", "unsupported"),
    ("qwen3_moe", {"n_group": 4}, "n_group", "unknown field"),
    ("qwen3_moe", {"use_qk_norm": False}, "use_qk_norm", "unsupported"),
    ("qwen3_moe", {"qkv_bias": True}, "qkv_bias", "unsupported"),
    ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size", "unsupported"),
    ("qwen2_moe", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types", "value"),
    ("qwen2_moe", {"layer_types": "full_attention"}, "layer_types", "value"),
    ("qwen2_moe", {"shared_expert_intermediate_size": None}, "shared_expert_intermediate_size", "missing"),
    ("mixtral", {"sliding_window": 4096}, "sliding_window", "unsupported"),
    ("mixtral", {"attention_bias": True}, "attention_bias", "unsupported"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise", "unsupported"),
    ("mixtral", {"hidden_size": 66}, "hidden_size", "value"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv", "unsupported"),
    ("qwen2", {"use_mrope": True}, "use_mrope", "unsupported"),
    ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types", "value"),
    ("gpt_oss", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types", "value"),
    ("gpt_oss", {"sliding_window": None}, "sliding_window", "missing"),
    ("gpt_oss", {"swiglu_limit": -7.0}, "swiglu_limit", "value"),
    ("gpt_oss", {"experts_per_token": 2}, "num_experts_per_tok", "contradiction"),
    ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act", "unsupported"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob", "unsupported"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method", "value"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func", "unsupported"),
    ("deepseek_v2", {"mlp_bias": True}, "mlp_bias", "unsupported"),
    ("deepseek_v2", {"n_group": 3}, "n_group", "value"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func", "unsupported"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method", "unsupported"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq", "unsupported"),
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave", "unsupported"),
    ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads", "value"),
    ("deepseek_v3", {"n_group": 16}, "n_group", "value"),
    ("deepseek_v3", {"topk_group": 5}, "topk_group", "value"),
    ("deepseek_v3", {"topk_group": 1, "num_experts_per_tok": 5}, "num_experts_per_tok", "value"),
    ("deepseek_v3", {"n_routed_experts": None}, "n_routed_experts", "missing"),
    ("deepseek_v3", {"num_local_experts": 8}, "n_routed_experts", "contradiction"),
    ("deepseek_v3", {"qk_rope_head_dim": 7}, "qk_rope_head_dim", "value"),
    ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank", "missing"),
    ("deepseek_v3", {"index_topk": 2048}, "index_topk", "unknown field"),
    ("kimi_k2", {"scoring_func": "softmax"}, "scoring_func", "unsupported"),
    ("glm4_moe", {"partial_rotary_factor": 1.5}, "partial_rotary_factor", "value"),
    ("glm4_moe", {"partial_rotary_factor": 0.1}, "partial_rotary_factor", "value"),
    ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func", "unsupported"),
    ("minimax_m2", {"use_routing_bias": False}, "use_routing_bias", "unsupported"),
    ("minimax_m2", {"use_qk_norm": False}, "use_qk_norm", "unsupported"),
    ("minimax_m2", {"qk_norm_type": "per_head"}, "qk_norm_type", "unsupported"),
    ("minimax_m2", {"shared_intermediate_size": 8}, "shared_intermediate_size", "unsupported"),
    ("minimax_m2", {"layernorm_mlp_beta": 0.5}, "layernorm_mlp_beta", "unsupported"),
    ("minimax_m2", {"routed_scaling_factor": 2.0}, "routed_scaling_factor", "unsupported"),
    ("minimax_m2", {"attn_type_list": [1, 0]}, "attn_type_list", "value"),
    ("minimax_m2", {"attn_type_list": [1]}, "attn_type_list", "value"),
    ("minimax_m2", {"rotary_dim": 64}, "rotary_dim", "value"),
    ("minimax_m2", {"partial_rotary_factor": 0.25}, "rotary_dim", "value"),
    ("qwen2", {"num_experts": 8}, "num_experts", "unknown field"),
]


@pytest.mark.parametrize(("family", "changes", "field", "what"), REFUSED)
def test_a_wrong_unsupported_or_unknown_field_is_refused_by_name(family, changes, field, what):
    assert faults(tiny_config(family, **changes)).get(field) == what


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_a_missing_size_is_named(family, field):
    raw = tiny_config(family)
    del raw[field]
    assert faults(raw) == {field: "missing"}


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_a_missing_number_of_experts_is_named(family):
    spellings = ("num_experts", "num_local_experts", "n_routed_experts")
    raw = {key: value for key, value in tiny_config(family).items() if key not in spellings}
    assert {field for field, what in faults(raw).items() if what == "missing"} <= set(spellings)
    assert "missing" in faults(raw).values()


def test_all_faults_come_at_once_and_each_once():
    with pytest.raises(ConfigError) as raised:
        read(tiny_config("qwen3_moe", hidden_size="x", head_dim=31, hidden_act="relu", strange=1))
    named = [fault.where for fault in raised.value.faults]
    assert sorted(named) == ["head_dim", "hidden_act", "hidden_size", "strange"]


def test_the_value_found_and_what_is_supported_are_told():
    with pytest.raises(ConfigError, match="'gelu'; supported: 'silu'"):
        read(tiny_config("qwen3_moe", hidden_act="gelu"))


@pytest.mark.parametrize("model_type", [None, "mixtrall", 3, ["mixtral"]])
def test_an_unknown_model_type_lists_the_known_ones(model_type):
    with pytest.raises(ConfigError) as raised:
        family_of({"model_type": model_type})
    assert all(known in str(raised.value) for known in FAMILIES)


def test_the_nearest_family_is_named_first():
    with pytest.raises(ConfigError, match="known: mixtral, "):
        family_of({"model_type": "mixtrall"})


def test_a_config_that_is_no_object_is_refused():
    with pytest.raises(ConfigError, match="list"):
        family_of([])  # pyright: ignore[reportArgumentType]


def test_reading_loads_no_torch():
    program = "import sys, moebius.models, moebius.models.counting; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_epsilon_is_the_files():
    assert read(tiny_config("mixtral", rms_norm_eps=0.25)).norm == RmsNorm(0.25)
