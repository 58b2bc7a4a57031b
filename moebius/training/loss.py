"""What a step minimises: the cross-entropy, and the balance of the experts.

B sequences, T tokens a sequence, L MoE layers, E experts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moebius.layers.decoder import Decoder, causal_loss
from moebius.layers.router import load_balancing_loss
from moebius.training.config import BalanceScope

Pooled = Callable[[Tensor], Tensor]


def alone(counts: Tensor) -> Tensor:
    """Of a batch that no other process has a part of."""
    return counts


def step_losses(
    decoder: Decoder, input_ids: Tensor, balance_scope: BalanceScope, pooled: Pooled = alone
) -> tuple[Tensor, Tensor | None]:
    """The cross-entropy of input_ids [B, T] int64, and the auxiliary loss times the decoder's router_aux_loss_coef.

    Both are float32 scalars; the second is None where there is nothing to balance.  pooled: sums counts over all parts
    of a step, of which input_ids are one; the auxiliary losses of the parts then add up to the step's.
    """
    wanted = balance_scope != "none" and bool(decoder.config.moe_layers)
    output = decoder(input_ids, output_router_logits=wanted)
    loss = causal_loss(output.logits, input_ids)
    if not wanted:
        return loss, None
    top_k = [layer.top_k for layer in decoder.config.moe_layers]
    match balance_scope:
        case "layer":
            balance = balance_by_layer(output.router_logits, top_k, pooled)
        case _:
            balance = load_balancing_loss(output.router_logits, top_k[0], pooled=pooled)
    return loss, decoder.config.router_aux_loss_coef * balance


def balance_by_layer(router_logits: Sequence[Tensor], top_k: Sequence[int], pooled: Pooled = alone) -> Tensor:
    """E * sum_e f_e P_e (Switch Transformers, 2101.03961, equations 4-6) of each layer, averaged over the layers.

    router_logits: L of [B*T, E].  top_k: experts a token, of each layer.  Pooling the layers before the product, as is
    common, lets an expert stay idle in one layer if its namesakes in others are busy; this does not.
    """
    losses = [load_balancing_loss((logits,), k, pooled=pooled) for logits, k in zip(router_logits, top_k, strict=True)]
    return torch.stack(losses).mean()
