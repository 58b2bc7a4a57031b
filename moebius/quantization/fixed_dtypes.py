"""Tensors whose dtype means something of its own, and which a cast of the whole model must leave alone."""

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class FixedDtypes(nn.Module):
    """Own parameters and buffers named with `fix_dtypes` follow the module to another device, but keep their dtype:
    packed values, their scales, and what is float32 in a model of another dtype.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fixed_dtypes: set[str] = set()

    def fix_dtypes(self, *names: str) -> None:
        """Keep the dtype of these tensors from now on; they may be replaced later."""
        self._fixed_dtypes.update(names)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What every `.to`, `.half`, `.cuda` and `.to_empty` of torch comes down to."""
        own = {**self._parameters, **self._buffers}
        fixed = [tensor for name in self._fixed_dtypes if (tensor := own.get(name)) is not None]
        fixed += [tensor.grad for tensor in fixed if tensor.grad is not None]

        def keep_dtype(tensor: Tensor) -> Tensor:
            if not any(tensor is each for each in fixed):
                return fn(tensor)
            # asked of nothing first: casting packed weights, only to drop the result, would take twice their memory
            probe = fn(tensor.detach().new_empty(0))
            return fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

        return super()._apply(keep_dtype, recurse)
