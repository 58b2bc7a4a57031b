"""Tensors whose dtype means something of its own, and which a cast of the whole model must leave alone."""

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class Constant(nn.Parameter):
    """A parameter without gradient, which stays so whatever is asked of the model around it."""

    def requires_grad_(self, mode: bool = True) -> Self:
        return self

    @property
    def requires_grad(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False

    @requires_grad.setter
    def requires_grad(self, requires_grad: bool) -> None: ...


class FixedDtypes(nn.Module):
    """Own parameters and buffers named with `fix_dtypes` follow the module to another device, but keep their dtype:
    packed values, their scales, and what is float32 in a model of another dtype.

    Of these, a parameter that has no gradient when it is named is a Constant from then on: the numbers in which a
    weight is packed cannot be trained.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fixed_dtypes: set[str] = set()
        self._constants: set[str] = set()

    def fix_dtypes(self, *names: str) -> None:
        """Keep the dtype of these tensors from now on; they may be replaced later."""
        self._fixed_dtypes.update(names)
        named = {name: parameter for name in names if (parameter := self._parameters.get(name)) is not None}
        self._constants.update(name for name, parameter in named.items() if not parameter.requires_grad)
        self._keep_constants()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Also what every assignment to an attribute, and `load_state_dict(assign=True)`, comes down to."""
        super().register_parameter(name, param)
        if name in self._constants:
            self._keep_constants()

    def _keep_constants(self) -> None:
        for name in self._constants:
            parameter = self._parameters.get(name)
            if parameter is not None and not isinstance(parameter, Constant):
                self._parameters[name] = Constant(parameter.data, requires_grad=False)

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

        super()._apply(keep_dtype, recurse)
        self._keep_constants()
        return self
