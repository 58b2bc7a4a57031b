"""The key/value cache: what each attention layer keeps of the tokens it has seen, in storage that stays where it is.

B batch, S capacity in tokens, H_kv key/value heads, D channels of each, P tokens kept so far, T tokens of this step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.config import CacheShapes, DecoderConfig
from moebius.errors import CapacityError

Device = torch.device | str


@dataclass
class Extent:
    """How many tokens a cache holds; its layers share it, so that all of them move at once."""

    length: int
    capacity: int


class KeyValueLayer:
    """One layer's keys and values, [B, S, H_kv, D] with a D each, token-major: a step's rows are written next to each
    other. A latent-attention layer keeps its latents and its rotated keys, which all heads share (H_kv is 1).

    All tokens are kept, of a layer with a sliding window too, though it reads only those in sight.
    """

    def __init__(self, keys: Tensor, values: Tensor, extent: Extent):
        self.keys, self.values = keys, values
        self._extent = extent

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write key and value [B, H_kv, T, D] after the tokens kept; give all so far, views [B, H_kv, P + T, D]."""
        start = self._extent.length
        end = start + key.shape[2]
        if end > self._extent.capacity:
            raise CapacityError(f"the cache holds {self._extent.capacity} tokens a row; {end} are needed")
        self.keys[:, start:end] = key.transpose(1, 2)
        self.values[:, start:end] = value.transpose(1, 2)
        return self.keys[:, :end].transpose(1, 2), self.values[:, :end].transpose(1, 2)


class KeyValueCache:
    """The cache of a whole decoder for B rows of up to S tokens.

    A forward writes beyond `length` and calls `advance` when it is done, so one that was interrupted leaves no trace.
    """

    def __init__(self, layers: Sequence[KeyValueLayer], extent: Extent):
        self.layers: Sequence[KeyValueLayer] = tuple(layers)
        self._extent = extent

    @classmethod
    def for_decoder(
        cls, config: DecoderConfig, *, batch: int, capacity: int, dtype: torch.dtype, device: Device | Sequence[Device]
    ) -> "KeyValueCache":
        """Allocate for `batch` rows of `capacity` tokens; device: one, or each layer's, `DecoderStack.layer_devices`.

        Raises CapacityError naming the bytes a token takes.
        """
        extent = Extent(length=0, capacity=capacity)
        devices = [device] * len(config.layers) if isinstance(device, Device) else device
        try:
            layers = [
                KeyValueLayer(*_storage(layer.mixer.cache_shapes, batch, capacity, dtype, place), extent)
                for layer, place in zip(config.layers, devices, strict=True)
            ]
        except RuntimeError as error:  # torch.OutOfMemoryError on a GPU is one
            raise CapacityError(_does_not_fit(config, batch, capacity, dtype)) from error
        return cls(layers, extent)

    @property
    def length(self) -> int:
        """Tokens a row kept so far, padding included."""
        return self._extent.length

    @property
    def capacity(self) -> int:
        return self._extent.capacity

    def advance(self, tokens: int) -> None:
        self._extent.length += tokens

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop a cache of {self.length} tokens to {length}")
        self._extent.length = length

    def grown(self, capacity: int) -> "KeyValueCache":
        """A larger cache with the same tokens."""
        extent = Extent(self.length, capacity)
        layers = [
            KeyValueLayer(
                _grown(layer.keys, self.length, capacity), _grown(layer.values, self.length, capacity), extent
            )
            for layer in self.layers
        ]
        return KeyValueCache(layers, extent)


def cache_bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
    """What one more token of one row takes, over all layers."""
    return config.cached_numbers * dtype.itemsize


def _storage(
    shapes: CacheShapes, batch: int, capacity: int, dtype: torch.dtype, device: Device
) -> tuple[Tensor, Tensor]:
    keys, values = (torch.empty((batch, capacity, *shape), dtype=dtype, device=device) for shape in shapes)
    return keys, values


def _grown(stored: Tensor, length: int, capacity: int) -> Tensor:
    larger = stored.new_empty((stored.shape[0], capacity, *stored.shape[2:]))
    larger[:, :length] = stored[:, :length]
    return larger


def _does_not_fit(config: DecoderConfig, batch: int, capacity: int, dtype: torch.dtype) -> str:
    token = cache_bytes_per_token(config, dtype)
    return (
        f"no memory for a cache of {batch} rows x {capacity:,} tokens: {token:,} bytes a token, "
        f"{token * batch * capacity:,} bytes in all"
    )
