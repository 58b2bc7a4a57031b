"""Tiny models of every family, and their transformers oracles with every parameter random.

Default initialisation hides faults: a dropped bias or norm scale would change nothing.
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
}
"""Each family's config.json, as small as its peculiarities allow."""

MOE_FAMILIES = tuple(family for family in TINY if family != "qwen2")


def tiny_config(family: str, **changes: Any) -> dict[str, Any]:
    """A fresh config.json of the family, with fields changed."""
    return {**TINY[family], **changes}


def make_oracle(family: str, seed: int = 0, **changes: Any) -> Any:
    """The transformers model of `tiny_config(family, **changes)`: float32, eager, eval mode, all random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = tiny_config(family, **changes)
    config = AutoConfig.for_model(**{key: value for key, value in raw.items() if key != "torch_dtype"})
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    randomize(model, seed)
    return model.eval()


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights 1.5 n / sqrt(fan-in), norm scales 1 + 0.2 n, biases 0.1 n, with n standard normal."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(1 + 0.2 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.1 * noise)
        else:
            parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)


def save_oracle(model: Any, folder: str | Path, **options: Any) -> Path:
    """Write the oracle in the hub's layout by transformers' own save_pretrained(**options)."""
    model.save_pretrained(folder, **options)
    return Path(folder)
