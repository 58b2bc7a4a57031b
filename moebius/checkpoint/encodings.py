"""Files as the planner sees them: heads of keys renamed, the tensors of a quantized weight taken together.  No torch.

A quantized weight lies in the files as values and scales (`quantization.forms`).  Which weights are quantized is said
by the files alone: by their dtype and the key beside them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from moebius.checkpoint.converter import PrefixRenaming, renamed_key
from moebius.checkpoint.files import CheckpointFiles, TensorInfo
from moebius.errors import Fault
from moebius.quantization.forms import BlockFp8, Form, Int8, Mxfp4, PackedInt4, Spec

FORM_NAMES = (Mxfp4.name, BlockFp8.name, PackedInt4.name, Int8.name)
WEIGHT = ".weight"
FLOAT_SCALES = ("float32", "bfloat16", "float16")
SCALE_DTYPES: Mapping[str, tuple[str, ...]] = {
    Mxfp4.name: ("uint8",),
    BlockFp8.name: (*FLOAT_SCALES, "float8_e8m0fnu"),
    PackedInt4.name: FLOAT_SCALES,
    Int8.name: FLOAT_SCALES,
}


@dataclass(frozen=True, slots=True)
class Encoded:
    """A stored weight that is decoded while it is read: what a TensorInfo is for a plain one.

    shape: the weight's.  dtype: the form's name.
    """

    name: str
    form: Form
    shape: tuple[int, ...]
    values: TensorInfo
    scales: TensorInfo

    @property
    def dtype(self) -> str:
        return self.form.name

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    @property
    def file(self) -> str:
        return self.values.file

    @property
    def offset(self) -> int:
        return self.values.offset


Stored = TensorInfo | Encoded


def pieces(stored: Stored) -> tuple[TensorInfo, ...]:
    """The tensors in the files that make it up."""
    return (stored.values, stored.scales) if isinstance(stored, Encoded) else (stored,)


@dataclass(frozen=True)
class Constant:
    """A stored tensor that says what is known anyway, and is compared with it: whole numbers."""

    info: TensorInfo
    expected: tuple[int, ...]


@dataclass(frozen=True)
class View:
    """tensors: by the keys that rules see.  constants: needed by no target."""

    tensors: Mapping[str, Stored]
    constants: tuple[Constant, ...]
    faults: tuple[Fault, ...]


class Ends(NamedTuple):
    """What the keys of a quantized weight have beyond those of a plain one; shape: empty where there is none.

    stem: how the plain one's key ends.
    """

    values: str
    scales: str
    shape: str
    stem: str


@dataclass(frozen=True)
class _Names:
    """How the keys of one form end: after `stem`, which the values' key has as well, and what rules see instead."""

    values: str
    scales: str
    shape: str | None
    seen_values: str
    seen_scales: str


_NAMES: Mapping[str, _Names] = {
    Mxfp4.name: _Names("_blocks", "_scales", None, "_blocks", "_scales"),
    BlockFp8.name: _Names(".weight", ".weight_scale_inv", None, ".weight", ".weight_scale"),
    PackedInt4.name: _Names(".weight_packed", ".weight_scale", ".weight_shape", ".weight", ".weight_scale"),
    Int8.name: _Names(".weight", ".weight_scale", None, ".weight", ".weight_scale"),
}


def ends_of(form: Form) -> Ends:
    """The ends of a weight's keys in this form: what it is saved under."""
    names = _NAMES[form.name]
    stem = names.seen_values if names.seen_values == WEIGHT else ""
    values, scales, shape = (end.removeprefix(stem) for end in (names.values, names.scales, names.shape or ""))
    return Ends(values, scales, shape, stem)


def view(files: CheckpointFiles, renamings: Sequence[PrefixRenaming], form: Form | None, keep: bool) -> View:
    """The files' tensors as rules see them.

    form: in which weights may be stored.  keep: values and scales by themselves, instead of one Encoded a weight.
    """
    faults: list[Fault] = []
    plain = _renamed(files, renamings, faults)
    if form is None:
        return View(plain, (), tuple(faults))
    names, seen, constants = _NAMES[form.name], dict[str, Stored](), list[Constant]()
    for stem in [key.removesuffix(names.scales) for key in plain if key.endswith(names.scales)]:
        weight = _weight(stem, names, form, plain, faults)
        if weight is not None:
            constants += _shape_constant(stem, names, weight, plain, faults)
            seen |= _seen(stem, names, weight, keep)
    return View({**plain, **seen}, tuple(constants), tuple(faults))


def unnamed_form(files: CheckpointFiles) -> str:
    """The key of a weight that is quantized by its looks; empty if none is."""
    signs = ((".weight_packed", "int32"), (".weight", "float8_e4m3fn"), ("_blocks", "uint8"))
    looks = (info.name for info in files.tensors.values() for end, dtype in signs if _looks(info, end, dtype))
    return next(looks, "")


def _looks(info: TensorInfo, end: str, dtype: str) -> bool:
    return info.dtype == dtype and info.name.endswith(end)


def _renamed(files: CheckpointFiles, renamings: Sequence[PrefixRenaming], faults: list[Fault]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for key, info in files.tensors.items():
        name = renamed_key(key, renamings) if renamings else key
        if other := tensors.get(name):
            faults.append(Fault(key, "two keys for one name", f"{other.name} is {name} as well"))
        tensors[name] = info
    return tensors


def _weight(stem: str, names: _Names, form: Form, plain: dict[str, TensorInfo], faults: list[Fault]) -> Encoded | None:
    """The weight of this stem, its keys taken out of `plain`; None if it cannot be one, which is a fault."""
    scales, values = plain.pop(stem + names.scales), plain.pop(stem + names.values, None)
    if values is None:
        faults.append(Fault(scales.name, "scales without values", f"{stem + names.values} is not in the files"))
        return None
    if scales.dtype not in SCALE_DTYPES[form.name]:
        expected = " or ".join(SCALE_DTYPES[form.name])
        faults.append(Fault(scales.name, "dtype", f"found {scales.dtype} in {scales.file}, expected {expected}"))
        return None
    held = _with_scale_dtype(form, scales.dtype)
    try:
        shape = held.weight_shape(values.shape)
        faults += [*_differences(values, held.values(shape)), *_differences(scales, held.scales(shape), _said(form))]
    except ValueError as error:
        faults.append(Fault(values.name, "shape", f"{list(values.shape)} in {values.file}: {error}"))
        return None
    return Encoded(stem + names.seen_values, held, shape, values, scales)


def _said(form: Form) -> str:
    """What of config.json the shape of scales follows from."""
    match form:
        case BlockFp8(block=block):
            return f", for the blocks of {list(block)} of config.json"
        case PackedInt4(group_size=size):
            return f", for the groups of {size} of config.json"
        case Mxfp4() | Int8():
            return ""


def _with_scale_dtype(form: Form, dtype: str) -> Form:
    """The form with its scales in the dtype that the files have them in."""
    match form:
        case Mxfp4():
            return form
        case BlockFp8() | PackedInt4() | Int8():
            return replace(form, scale_dtype=dtype)


def _differences(info: TensorInfo, expected: Spec, said: str = "") -> Iterator[Fault]:
    if info.dtype != expected.dtype:
        yield Fault(info.name, "dtype", f"found {info.dtype} in {info.file}, expected {expected.dtype}")
    if info.shape != expected.shape:
        yield Fault(
            info.name, "shape", f"found {list(info.shape)} in {info.file}, expected {list(expected.shape)}{said}"
        )


def _shape_constant(
    stem: str, names: _Names, weight: Encoded, plain: dict[str, TensorInfo], faults: list[Fault]
) -> list[Constant]:
    """The stored shape, which the loader compares with the one that follows from the values."""
    info = None if names.shape is None else plain.pop(stem + names.shape, None)
    if info is None:
        return []
    if (info.shape, info.dtype) not in (((2,), "int64"), ((2,), "int32")):
        faults.append(Fault(info.name, "dtype", f"found {list(info.shape)} {info.dtype}, expected [2] int64 or int32"))
        return []
    return [Constant(info, weight.shape)]


def _seen(stem: str, names: _Names, weight: Encoded, keep: bool) -> dict[str, Stored]:
    if keep:
        return {stem + names.seen_values: weight.values, stem + names.seen_scales: weight.scales}
    return {weight.name: weight}
