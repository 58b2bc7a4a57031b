"""Damages of config.json.

Each changes the files in place and gives the names of which an error has to say at least one; none: any will do.  A
damage that does not apply (what it wants to change is not there, or can no longer be read) raises ValueError.
"""

import random

from tests.fuzz.documents import CONFIG, Files, Pairs, parse, rendered
from tests.fuzz.oddities import ANY_NAME, NUMBERS, Names, damage_document, near, odd_value

FORMS = ("fp8", "mxfp4", "compressed-tensors", "gptq", "awq", "bitsandbytes", None, 5)


def config_document(rng: random.Random, files: Files) -> Names:
    config = _config(files)
    damage_document(rng, config)
    files[CONFIG] = rendered(config)
    return ANY_NAME


def config_number(rng: random.Random, files: Files) -> Names:
    """A number, anywhere in it, for another one."""
    config = _config(files)
    pairs = [pair for pair in _objects(config) if isinstance(pair[1], int | float)]
    if not pairs:
        raise ValueError("no numbers")
    pair = rng.choice(pairs)
    pair[1] = rng.choice((rng.choice(NUMBERS), near(rng, pair[1]), rng.choice(pairs)[1], rng.randint(0, 300)))
    files[CONFIG] = rendered(config)
    return ANY_NAME


def config_form(rng: random.Random, files: Files) -> Names:
    """What it says of quantization."""
    config = _config(files)
    found = [pair for pair in _objects(config) if pair[0] == "quantization_config"]
    if found and isinstance(found[0][1], Pairs) and rng.random() < 0.8:
        damage_document(rng, found[0][1])
    else:
        block = [rng.choice((1, 20, 24, 128)), rng.choice((0, 1, 20, 2**31 - 1))]
        config.put("quantization_config", Pairs([["quant_method", rng.choice(FORMS)], ["weight_block_size", block]]))
    files[CONFIG] = rendered(config)
    return ANY_NAME


def config_type(rng: random.Random, files: Files) -> Names:
    """Another family's name, or none."""
    config = _config(files)
    types = (
        "mixtral",
        "qwen3_moe",
        "qwen2",
        "gpt_oss",
        "deepseek_v3",
        "deepseek_v2",
        "kimi_k25",
        "llama",
        "olmoe",
        "qwen2_moe",
    )
    config.put("model_type", rng.choice((*types, odd_value(rng))))
    if rng.random() < 0.7:
        config.drop("architectures")
    files[CONFIG] = rendered(config)
    return ANY_NAME


def config_field(rng: random.Random, files: Files) -> Names:
    """A field that configs of some family have."""
    config = _config(files)
    config.put(rng.choice(FIELDS.split()), rng.choice((odd_value(rng), True, 1, None)))
    files[CONFIG] = rendered(config)
    return ANY_NAME


def _config(files: Files) -> Pairs:
    config = parse(files.get(CONFIG))
    if not isinstance(config, Pairs):
        raise ValueError("no object")
    return config


def _objects(value: object) -> list[list]:
    """Every [key, value] pair of a document."""
    if isinstance(value, Pairs):
        return [each for pair in value for each in (pair, *_objects(pair[1]))]
    return [pair for item in value for pair in _objects(item)] if isinstance(value, list) else []


FIELDS = """
    tie_word_embeddings torch_dtype dtype rope_scaling rope_parameters sliding_window layer_types mlp_only_layers
    decoder_sparse_step first_k_dense_replace n_shared_experts moe_layer_freq attention_bias qkv_bias clip_qkv
    text_config vision_config quantization_config num_experts num_local_experts n_routed_experts head_dim
    rotary_dim partial_rotary_factor num_nextn_predict_layers eos_token_id pad_token_id router_aux_loss_coef
    auto_map shared_expert_intermediate_size use_sliding_window max_window_layers architectures id2label
    hidden_act
"""
