"""The conversion rules that families share: the hub's keys to the decoder's names.  No torch.

E experts, H hidden, I expert width.
"""

from moebius.checkpoint.converter import Rule, WeightConverter, WeightSkip
from moebius.checkpoint.operations import Concatenate, MergeModulelist

SKIPPED_KEYS: tuple[Rule, ...] = (WeightSkip("self_attn.rotary_emb.inv_freq", "computed from rope_theta"),)


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
