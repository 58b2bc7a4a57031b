"""Tiny models of every family, and their transformers oracles with every parameter and correction bias random.

Default initialisation hides faults: a dropped bias, sink or norm scale would change nothing.
Here it moves logits by 1 and more.
"""

from pathlib import Path
from typing import Any

import torch

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

ROUTED: dict[str, Any] = {"router_aux_loss_coef": 0.05, "output_router_logits": False}

LATENTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 16,
    "v_head_dim": 12,
    "attention_bias": False,
}
"""Values narrower than keys, and every width another one."""

GROUPED: dict[str, Any] = {
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
}
"""One dense layer, then sixteen experts in four groups, of which two are kept."""

YARN: dict[str, Any] = {
    "type": "yarn",
    "factor": 8,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

TINY: dict[str, dict[str, Any]] = {
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **COMMON,
        **ROUTED,
        "rms_norm_eps": 1e-5,
        "intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **COMMON,
        **ROUTED,
        "rms_norm_eps": 1e-6,
        "head_dim": 32,
        "attention_bias": False,
        "intermediate_size": 48,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 2,
    },
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        **COMMON,
        **ROUTED,
        "rms_norm_eps": 1e-6,
        "intermediate_size": 56,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 40,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 2,
    },
    "olmoe": {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        **COMMON,
        **ROUTED,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "clip_qkv": None,
        "intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "rope_scaling": None,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **COMMON,
        "rms_norm_eps": 1e-6,
        "intermediate_size": 96,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 2,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        **COMMON,
        **ROUTED,
        "rms_norm_eps": 1e-5,
        "head_dim": 32,
        "attention_bias": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "intermediate_size": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "experts_per_token": 3,
        "swiglu_limit": 7.0,
        "rope_scaling": {**YARN, "truncate": False, "mscale": None, "mscale_all_dim": None},
    },
    "deepseek_v2": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        **COMMON,
        **LATENTS,
        **GROUPED,
        "rms_norm_eps": 1e-6,
        "n_shared_experts": 2,
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 16.0,
        "rope_scaling": {**YARN, "mscale_all_dim": 0.707},
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **COMMON,
        **LATENTS,
        **GROUPED,
        "rms_norm_eps": 1e-6,
        "moe_layer_freq": 1,
        "n_shared_experts": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "rope_scaling": YARN,
    },
    "kimi_k2": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        **COMMON,
        **LATENTS,
        **GROUPED,
        "rms_norm_eps": 1e-5,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.827,
        "num_nextn_predict_layers": 0,
        "rope_theta": 50000.0,
        "rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0},
    },
    "glm4_moe": {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        **COMMON,
        **GROUPED,
        "rms_norm_eps": 1e-5,
        "head_dim": 32,
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "rope_scaling": None,
    },
    "minimax_m2": {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        **COMMON,
        **ROUTED,
        "rms_norm_eps": 1e-6,
        "head_dim": 32,
        "rotary_dim": 16,
        "intermediate_size": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "shared_intermediate_size": 0,
        "attn_type_list": [1, 1],
        "num_mtp_modules": 3,
        "mtp_transformer_layers": 1,
    },
}
"""Each family's config.json, as small as its peculiarities allow."""

MOE_FAMILIES = tuple(family for family in TINY if family != "qwen2")
AUX_LOSS_FAMILIES = tuple(family for family in TINY if "router_aux_loss_coef" in TINY[family])
UNKNOWN_TO_TRANSFORMERS = {"kimi_k2": "deepseek_v3"}


def tiny_config(family: str, **changes: Any) -> dict[str, Any]:
    """A fresh config.json of the family, with fields changed."""
    return {**TINY[family], **changes}


def make_oracle(family: str, seed: int = 0, **changes: Any) -> Any:
    """The transformers model of `tiny_config(family, **changes)`: float32, eager, eval mode, all random."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        oracle_config(tiny_config(family, **changes)),
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    randomize(model, seed)
    return model.eval()


def oracle_config(raw: dict[str, Any]) -> Any:
    """transformers' config of a config.json's content; kimi_k2 is deepseek_v3 to it."""
    from transformers import AutoConfig

    model_type = UNKNOWN_TO_TRANSFORMERS.get(raw["model_type"], raw["model_type"])
    fields = {key: value for key, value in raw.items() if key != "torch_dtype"}
    return AutoConfig.for_model(**{**fields, "model_type": model_type})


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights 1.5 n / sqrt(fan-in), norm scales 1 + 0.2 n, biases 0.1 n, sinks 0.5 n, correction biases 0.2 n, with n
    standard normal.  Gate and up projections of clamped experts four times as large, or nothing would be clamped.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {**dict(model.named_parameters()), **dict(_correction_biases(model))}
    clamped = any(name.endswith("sinks") for name in tensors)
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name:
            tensor.copy_(1 + 0.2 * noise)
        elif name.endswith("correction_bias"):
            tensor.copy_(0.2 * noise)
        elif name.endswith("sinks"):
            tensor.copy_(0.5 * noise)
        elif name.endswith("bias"):
            tensor.copy_(0.1 * noise)
        else:
            tensor.copy_(_weight_scale(name, clamped) * noise / tensor.shape[-1] ** 0.5)


def _weight_scale(name: str, clamped: bool) -> float:
    if "_b_proj" in name:  # out of MLA's latents, one product more than elsewhere: with 1.5, float32 noise nears 5e-5
        return 1.0
    return 6.0 if clamped and name.endswith("experts.gate_up_proj") else 1.5


def _correction_biases(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("correction_bias")]


def save_oracle(model: Any, folder: str | Path, **options: Any) -> Path:
    """Write the oracle in the hub's layout by transformers' own save_pretrained(**options)."""
    model.save_pretrained(folder, **options)
    return Path(folder)
