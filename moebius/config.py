"""What a decoder is made of, as data: frozen dataclasses, no torch.

A family file reads a config.json into a DecoderConfig; layers/ builds from it and knows nothing else. Every choice that
differs between families is a *kind* (a dataclass) or a field of one here, never a family's name.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class SwiGLU:
    """silu(gate) * up (Shazeer 2020, GLU Variants Improve Transformer, section 2)."""


@dataclass(frozen=True)
class ClampedSwiGLU:
    """g sigmoid(alpha g) (u + 1), with g the gate up to `limit` and u the up projection within +-limit (gpt-oss,
    arXiv 2508.10925, section 2.2).
    """

    alpha: float = 1.702
    limit: float = 7.0


Activation = SwiGLU | ClampedSwiGLU


@dataclass(frozen=True)
class RmsNorm:
    """Normalise in float32, cast to the model's dtype, then scale by the weight (Zhang and Sennrich 2019).

    scale_in_float32: scale first, then cast.
    """

    eps: float
    scale_in_float32: bool = False


@dataclass(frozen=True)
class Yarn:
    """Rope beyond the length it was trained for (Peng et al. 2023, YaRN, arXiv 2309.00071, sections 3.2 and 3.4).

    beta_fast, beta_slow: rotations over the original length between which frequencies are blended.  truncate: round
    the bounds to whole channels.  attention_factor: what cos and sin are multiplied by; None derives it from factor,
    mscale and mscale_all_dim.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding on the first `rotary_dim` channels (Su et al. 2021).

    Pairs are (i, i + rotary_dim/2); interleaved: (2i, 2i + 1).
    """

    theta: float
    rotary_dim: int
    interleaved: bool = False
    yarn: Yarn | None = None


CacheShapes = tuple[tuple[int, int], tuple[int, int]]
"""(heads, channels) of each of the two tensors that a mixer keeps of a token in a cache."""


@dataclass(frozen=True)
class GroupedQueryAttention:
    """Scale head_dim ** -0.5.  qk_norm: RMS norm of q and k, per head after the split, or "full" width before it.

    sliding_window: W, where query i sees key j iff i - W < j <= i; None sees all before it.  sinks: one learned logit a
    query head takes part in the softmax and is then dropped (gpt-oss).
    """

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: Rope
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    sliding_window: int | None = None
    sinks: bool = False

    @property
    def cache_shapes(self) -> CacheShapes:
        return (self.num_key_value_heads, self.head_dim), (self.num_key_value_heads, self.head_dim)


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention, MLA (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    q_lora_rank: width of the query's latent, None projects the query directly.  kv_lora_rank: width of the latent of
    keys and values, which is what a cache keeps, beside one rotated key of qk_rope_head_dim that all heads share.
    norm: of both latents.  bias: on the projections into the latents and on the output.
    """

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope: Rope
    norm: RmsNorm
    bias: bool = False

    @property
    def cache_shapes(self) -> CacheShapes:
        return (1, self.kv_lora_rank), (1, self.qk_rope_head_dim)


Mixer = GroupedQueryAttention | LatentAttention


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


@dataclass(frozen=True)
class TopKSoftmax:
    """The top k logits of a gate with a bias, then softmax over these k alone, in the logits' dtype (gpt-oss)."""


@dataclass(frozen=True)
class SoftmaxGroupTopK:
    """Softmax over all experts in float32, then the top k within the `top_groups` best of `num_groups` groups of
    experts, by each group's largest; weights times `scale`, never renormalised (DeepSeek-V2, section 2.1.2).
    """

    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0


@dataclass(frozen=True)
class SigmoidTopK:
    """Sigmoid in float32; a correction bias, float32 and without gradient, takes part in the choice but not in the
    weights (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    A group's score is the sum of its two best.  renormalize: divide the weights by their sum + epsilon.  scale: times
    this, after that.  float32_gate: the gate's weight stays float32 in a model of another dtype.
    """

    renormalize: bool
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    epsilon: float = 1e-20
    float32_gate: bool = False


Routing = SoftmaxTopK | TopKSoftmax | SoftmaxGroupTopK | SigmoidTopK


@dataclass(frozen=True)
class SharedExpert:
    """An MLP that every token visits.  gated: times sigmoid of a linear gate of the token."""

    intermediate_size: int
    gated: bool


@dataclass(frozen=True)
class SparseMoe:
    """num_experts = E, top_k = K experts a token, intermediate_size = I of each expert.

    bias: on the experts' projections.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    routing: Routing
    activation: Activation = SwiGLU()
    shared_expert: SharedExpert | None = None
    bias: bool = False


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

    @property
    def cached_numbers(self) -> int:
        """How many numbers a token leaves in a cache, over all layers."""
        return sum(heads * channels for layer in self.layers for heads, channels in layer.mixer.cache_shapes)
