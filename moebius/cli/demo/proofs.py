"""What the demo proves, each a claim with what was found.

T tokens, V vocabulary.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.checkpoint.planning import Plan
from moebius.config import DecoderConfig
from moebius.layers.decoder import Decoder

FULL_RUN = 900  # steps; a shorter run is not judged by what it learned
BITS_GOAL = 1.9
PROJECTIONS = 3  # gate, up and down of an expert


@dataclass(frozen=True)
class Proof:
    """claim: what should hold.  holds: whether it does.  found: the numbers."""

    claim: str
    holds: bool
    found: str


def skill_proof(bits_per_byte: float, steps: int) -> Proof:
    """A full run has to predict the held-out text below the goal; a short one is only reported."""
    if steps < FULL_RUN:
        return Proof("held-out text was read", True, f"not judged before {FULL_RUN} steps, {steps} were made")
    return Proof(f"held-out text below {BITS_GOAL} bits a byte", bits_per_byte < BITS_GOAL, f"{bits_per_byte:.3f}")


def layout_proof(plan: Plan, config: DecoderConfig) -> Proof:
    """The files hold each projection of each expert as a tensor of its own."""
    expected = sum(PROJECTIONS * layer.num_experts for layer in config.moe_layers)
    found = sum(".experts." in read.info.name for read in plan.reads)
    return Proof("every expert is in the file by itself", found == expected, f"{found} of {expected} tensors")


def tensors_proof(trained: Decoder, loaded: Decoder) -> Proof:
    """Every parameter of the loaded model has the bytes of the trained one, by SHA-256."""
    before, after = _hashes(trained), _hashes(loaded)
    equal = sum(after.get(name) == digest for name, digest in before.items())
    holds = before.keys() == after.keys() and equal == len(before)
    return Proof("every loaded parameter equals the trained one (sha256)", holds, f"{equal} of {len(before)} equal")


def _hashes(decoder: Decoder) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in decoder.named_parameters()  # a tied one once, as the plan counts it
    }


@torch.no_grad()
def logits_proof(trained: Decoder, loaded: Decoder, input_ids: Tensor) -> Proof:
    """input_ids [1, T]: both models give the same logits [1, T, V], to the bit."""
    difference = (trained(input_ids).logits - loaded(input_ids).logits).abs().max().item()
    return Proof("logits before and after are the same", difference == 0.0, f"largest difference {difference}")


def tokens_proof(auto: Tensor, eager: Tensor) -> Proof:
    """Token ids [1, T] that two backends generated from one seed."""
    return Proof(
        "the backends auto and eager generate the same tokens", torch.equal(auto, eager), f"{auto.shape[1]} tokens"
    )
