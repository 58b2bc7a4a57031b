"""The conversion rules that families share: the hub's keys to the decoder's names.  No torch.

E experts, H hidden, I expert width.
"""

from moebius.checkpoint.converter import Rule, WeightConverter, WeightRenaming, WeightSkip
from moebius.checkpoint.operations import Concatenate, MergeModulelist
from moebius.config import DecoderConfig

SKIPPED_KEYS: tuple[Rule, ...] = (
    WeightSkip("self_attn.rotary_emb.inv_freq", "computed from rope_theta"),
    WeightSkip("mtp.**", "predicts several tokens at once; not part of the decoder"),
)


def skipped_layers(config: DecoderConfig) -> tuple[Rule, ...]:
    """For families that publish such layers, which a projection of two hidden states marks (DeepSeek-V3, arXiv
    2412.19437, section 2.2); any other layer too many is a fault.
    """
    reason = "beyond num_hidden_layers: predicts several tokens at once; not part of the decoder"
    return (WeightSkip("model.layers.*.**", reason, first=len(config.layers), beside="eh_proj.weight"),)


def packed_experts(block: str, *, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Per-expert gate and up [I, H] -> gate_up_proj [E, 2I, H], gate rows first; down [H, I] -> down_proj [E, H, I].

    block: the segment above `experts` in the hub's keys.
    """
    source = f"{block}.experts.*."
    return (
        WeightConverter(
            [f"{source}{gate}.weight", f"{source}{up}.weight"],
            "mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(f"{source}{down}.weight", "mlp.experts.down_proj", operations=[MergeModulelist(dim=0)]),
    )


def standard_experts() -> tuple[Rule, ...]:
    return packed_experts("mlp", gate="gate_proj", up="up_proj", down="down_proj")


def mixtral_experts() -> tuple[Rule, ...]:
    """Mixtral's names, which others took over: w1 gate, w3 up, w2 down, and the gate beside them."""
    return (
        *packed_experts("block_sparse_moe", gate="w1", up="w3", down="w2"),
        WeightRenaming("block_sparse_moe.gate.weight", "mlp.gate.weight"),
    )


def plain_shared_expert() -> tuple[Rule, ...]:
    """DeepSeek's plural, for what is one MLP."""
    names = [f"{part}_proj.weight" for part in ("gate", "up", "down")]
    return tuple(WeightRenaming(f"mlp.shared_experts.{name}", f"mlp.shared_expert.{name}") for name in names)
