"""From a weight to a quantized form of it and back, whatever the form."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moebius.errors import ArgumentError, Fault
from moebius.quantization import fp8, int4, int8, mxfp4
from moebius.quantization.forms import BlockFp8, Form, Int8, Mxfp4, PackedInt4, Spec


def dequantize(form: Form, values: Tensor, scales: Tensor, dtype: torch.dtype, segments: int = 1) -> Tensor:
    """The weight [..., out, in] in `dtype`: products in float32, rounded once.

    values, scales: as `form` lays them out, with any leading axes.  segments: matrices stacked on the `out` axis, the
    scales of each beginning anew.  Needs three times the float32 weight at most, the result included.
    ArgumentError: values or scales have other shapes or dtypes than the form's.
    """
    _check(form, values, scales, segments)
    match form:
        case Mxfp4():
            return mxfp4.unpack(form, values, scales, dtype)
        case BlockFp8():
            return fp8.unpack(form, values, scales, dtype, segments)
        case PackedInt4():
            return int4.unpack(form, values, scales, dtype)
        case Int8():
            return int8.unpack(form, values, scales, dtype)


def quantize(form: Form, weight: Tensor, segments: int = 1) -> tuple[Tensor, Tensor]:
    """weight [..., out, in] -> (values, scales) as `form` lays them out, to the nearest.

    segments: as for `dequantize`.  ArgumentError: the form does not take a weight of this shape.
    """
    layout(form, weight.shape, segments)  # or an error
    weight = weight.contiguous()
    match form:
        case Mxfp4():
            return mxfp4.pack(form, weight)
        case BlockFp8():
            return fp8.pack(form, weight, segments)
        case PackedInt4():
            return int4.pack(form, weight)
        case Int8():
            return int8.pack(form, weight)


def layout(form: Form, shape: Sequence[int], segments: int = 1) -> tuple[Spec, Spec]:
    """Of the values and the scales of a weight [..., out, in].  ArgumentError: `form` takes no weight of this shape."""
    try:
        return form.values(shape), form.scales(shape, segments)
    except ValueError as error:
        raise ArgumentError(f"a weight {list(shape)}: {error}") from None


def _check(form: Form, values: Tensor, scales: Tensor, segments: int) -> None:
    wanted = layout(form, form.weight_shape(values.shape), segments)
    faults = [
        Fault(name, "layout", f"expected {_described(spec)}, found {_described(found)}")
        for name, spec, found in zip(("values", "scales"), wanted, map(_spec, (values, scales)), strict=True)
        if found != spec
    ]
    if faults:
        raise ArgumentError(f"not a weight in the form {form.name}", faults=faults)


def _spec(tensor: Tensor) -> Spec:
    return Spec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _described(spec: Spec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"
