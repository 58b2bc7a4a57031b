"""The model that the tests of training train."""

from moebius.config import (
    DecoderConfig,
    GroupedQueryAttention,
    LayerConfig,
    RmsNorm,
    Rope,
    SoftmaxTopK,
    SparseMoe,
)


def tiny_config(num_experts: int = 4) -> DecoderConfig:
    """Two sparse layers, experts of which a token visits 2, 64 tokens of vocabulary."""
    attention = GroupedQueryAttention(num_heads=2, num_key_value_heads=1, head_dim=8, rope=Rope(1e4, 8))
    moe = SparseMoe(num_experts=num_experts, top_k=2, intermediate_size=12, routing=SoftmaxTopK(renormalize=True))
    return DecoderConfig(
        model_type="tiny",
        vocab_size=64,
        hidden_size=16,
        max_position_embeddings=64,
        layers=(LayerConfig(attention, moe),) * 2,
        norm=RmsNorm(1e-6),
        router_aux_loss_coef=0.01,
    )
