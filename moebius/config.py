"""What a decoder is made of, as data: frozen dataclasses, no torch.

A family file reads a config.json into a DecoderConfig; layers/ builds from it and knows nothing else. Every choice that
differs between families is a *kind* (a dataclass) or a field of one here, never a family's name.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class SwiGLU:
    """silu(gate) * up (Shazeer 2020, GLU Variants Improve Transformer, section 2)."""


Activation = SwiGLU


@dataclass(frozen=True)
class RmsNorm:
    """Normalise in float32, cast to the model's dtype, then scale by the weight (Zhang and Sennrich 2019)."""

    eps: float


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding on the first `rotary_dim` channels, pairs (i, i + rotary_dim/2) (Su et al. 2021)."""

    theta: float
    rotary_dim: int


@dataclass(frozen=True)
class GroupedQueryAttention:
    """Scale head_dim ** -0.5.  qk_norm: RMS norm of q and k, per head after the split, or "full" width before it."""

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: Rope
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"


Mixer = GroupedQueryAttention


@dataclass(frozen=True)
class DenseMlp:
    intermediate_size: int
    activation: Activation = SwiGLU()


@dataclass(frozen=True)
class SoftmaxTopK:
    """Softmax over all experts in float32, then the top k.

    renormalize: divide the chosen weights by their sum.  float32_weights: keep the weights in float32 instead of
    casting them back to the logits' dtype.
    """

    renormalize: bool
    float32_weights: bool = False


Routing = SoftmaxTopK


@dataclass(frozen=True)
class SharedExpert:
    """An MLP that every token visits.  gated: times sigmoid of a linear gate of the token."""

    intermediate_size: int
    gated: bool


@dataclass(frozen=True)
class SparseMoe:
    """num_experts = E, top_k = K experts a token, intermediate_size = I of each expert."""

    num_experts: int
    top_k: int
    intermediate_size: int
    routing: Routing
    activation: Activation = SwiGLU()
    shared_expert: SharedExpert | None = None


FeedForward = DenseMlp | SparseMoe


@dataclass(frozen=True)
class LayerConfig:
    mixer: Mixer
    feed_forward: FeedForward


@dataclass(frozen=True)
class DecoderConfig:
    """A whole decoder: embedding, `layers` in order, final norm, head.

    dtype: the checkpoint's own ("bfloat16", ...), or None if its config does not say.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    layers: tuple[LayerConfig, ...]
    norm: RmsNorm
    tie_word_embeddings: bool = False
    dtype: str | None = None
    initializer_range: float = 0.02
    router_aux_loss_coef: float = 0.0
    output_router_logits: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = field(default=())
    pad_token_id: int | None = None

    @property
    def moe_layers(self) -> tuple[SparseMoe, ...]:
        return tuple(layer.feed_forward for layer in self.layers if isinstance(layer.feed_forward, SparseMoe))
