"""Two 4-bit codes a byte, low nibble first.  n bytes."""

from collections.abc import Sequence

import torch
from torch import Tensor


def decode(packed: Tensor, table: Sequence[float]) -> Tensor:
    """packed uint8 [..., n], table: what each of the 16 codes means -> float32 [..., 2n]."""
    pairs = torch.tensor([(low, high) for high in table for low in table], dtype=torch.float32, device=packed.device)
    # a byte at a time: the two numbers that it stands for are looked up as one of eight bytes
    found = pairs.view(torch.int64).flatten().index_select(0, packed.flatten().int())
    return found.view(torch.float32).view(*packed.shape[:-1], 2 * packed.shape[-1])


def join(codes: Tensor) -> Tensor:
    """uint8 [..., 2n] below 16 -> uint8 [..., n]."""
    return codes[..., ::2] | codes[..., 1::2] << 4
