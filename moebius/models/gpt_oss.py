"""gpt-oss (OpenAI 2025): sinks, windows on every other layer, biases everywhere, a clamped activation.

E experts, H hidden, I expert width.  The hub's experts alternate gate and up rows; ours have gate rows first.  `down`
is square in the released models, so the orientation comes from the key, never from the shape: packed blocks lie [out,
in], the bfloat16 re-exports lie [in, out].
"""

from dataclasses import replace
from typing import Any

from moebius.checkpoint.converter import Rule, WeightConverter, WeightRenaming
from moebius.checkpoint.operations import Interleave, Transpose
from moebius.config import ClampedSwiGLU, DecoderConfig, LayerConfig, TopKSoftmax, Yarn
from moebius.errors import ConfigError
from moebius.models.attention_fields import grouped_mixer, read_attention, read_windows, write_attention, write_windows
from moebius.models.decoder_fields import read_decoder, write_decoder, write_router_loss
from moebius.models.family import Family
from moebius.models.layer_fields import only_moe, read_moe, read_num_layers
from moebius.models.reading import ConfigReader
from moebius.models.rules import SKIPPED_KEYS

YARN = Yarn(factor=32.0, original_max_position_embeddings=4096, truncate=False)
PLAIN_ROPE = {"rope_scaling": {"rope_type": "default"}}

_GATES_FIRST = Interleave(dim=1, undo=True)
_EXPERTS = "mlp.experts."


def _read(reader: ConfigReader) -> DecoderConfig:
    reader.ignore("initial_context_length")  # YaRN's original length, said again
    bias = reader.boolean("attention_bias", default=True)
    mixer = read_attention(reader, qkv_bias=bias, output_bias=bias, sinks=True, head_dim=64, theta=150_000.0, yarn=YARN)
    moe = read_moe(
        reader,
        width_field="intermediate_size",
        top_k_fields=("num_experts_per_tok", "experts_per_token"),
        routing=TopKSoftmax(),
        activation=_read_activation(reader),
        bias=True,
    )
    windows = read_windows(reader, read_num_layers(reader), absent=128)
    layers = tuple(LayerConfig(replace(mixer, sliding_window=window), moe) for window in windows)
    return read_decoder(reader, "gpt_oss", layers, eps=1e-5, scale_norm_in_float32=True, aux_loss_coef=0.001)


def _read_activation(reader: ConfigReader) -> ClampedSwiGLU:
    """What runs whatever `hidden_act` says."""
    alpha, limit = reader.positive("swiglu_alpha", default=1.702), reader.positive("swiglu_limit", default=7.0)
    return ClampedSwiGLU(alpha, limit)


def _write(config: DecoderConfig) -> dict[str, Any]:
    mixer, moe = grouped_mixer(config), only_moe(config)
    if not isinstance(moe.activation, ClampedSwiGLU):
        raise ConfigError("a gpt_oss config.json cannot say that the activation is not clamped")
    return {
        **write_decoder(config),
        **write_router_loss(config),
        **(PLAIN_ROPE if mixer.rope.yarn is None else {}),
        **write_attention(mixer),
        **write_windows(config),
        "attention_bias": mixer.qkv_bias,
        "intermediate_size": moe.intermediate_size,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "swiglu_alpha": moe.activation.alpha,
        "swiglu_limit": moe.activation.limit,
    }


def _rules(config: DecoderConfig) -> tuple[Rule, ...]:
    return (
        *(WeightRenaming(f"mlp.router.{part}", f"mlp.gate.{part}") for part in ("weight", "bias")),
        *_unpacked(),
        *_packed(),
        *SKIPPED_KEYS,
    )


def _unpacked() -> tuple[Rule, ...]:
    """gate_up [E, H, 2I] and its bias [E, 2I], alternating; down [E, I, H]."""
    gate_up, down = f"{_EXPERTS}gate_up_proj", f"{_EXPERTS}down_proj"
    return (
        WeightConverter(gate_up, gate_up, operations=[Transpose(1, 2), _GATES_FIRST]),
        WeightConverter(down, down, operations=[Transpose(1, 2)]),
        WeightConverter(f"{gate_up}_bias", f"{gate_up}_bias", operations=[_GATES_FIRST]),
    )


def _packed() -> tuple[Rule, ...]:
    """MXFP4: gate_up blocks [E, 2I, H/32, 16] and scales [E, 2I, H/32], alternating; down's [E, H, I/32, ...]."""
    gate_up, down = f"{_EXPERTS}gate_up_proj", f"{_EXPERTS}down_proj"
    return (
        WeightConverter(f"{gate_up}_blocks", gate_up, operations=[_GATES_FIRST]),
        WeightConverter(f"{gate_up}_scales", f"{gate_up}_scale", operations=[_GATES_FIRST]),
        WeightRenaming(f"{down}_blocks", down),
        WeightRenaming(f"{down}_scales", f"{down}_scale"),
    )


FAMILY = Family("gpt_oss", "GptOssForCausalLM", _read, _write, _rules)
