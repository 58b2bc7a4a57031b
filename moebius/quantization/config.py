"""What is to be quantized while a model is loaded, and how: data, checked when it is made.  No torch."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from moebius.errors import ArgumentError, Fault
from moebius.quantization.forms import BlockFp8, Form, Int8, Mxfp4, PackedInt4

FORMS = ("int8", "int4", "fp8", "mxfp4")
PARTS = ("experts", "linears")
PUBLISHED_PARTS: Mapping[str, tuple[str, ...]] = {"mxfp4": ("experts",)}  # gpt-oss leaves all else plain


@dataclass(frozen=True)
class QuantizationConfig:
    """Which weights of a plain checkpoint become which quantized form while they are read.

    form: "int8" (a scale a row), "int4" (a scale a group of inputs), "fp8" (e4m3, a scale a block), "mxfp4".
    group_size: of "int4" alone, a multiple of 8; None is 32.  block: of "fp8" alone, (rows, columns); None is (128,
    128).  parts: "experts" (routed ones) and "linears" (of attention, dense and shared MLPs); None is both, and for
    "mxfp4" the experts alone, as it is published.  Router, gates, norms, embedding and head are never quantized.
    modules_to_not_convert: further modules that stay plain, by whole dotted segments anywhere in their name, `*` for an
    index: "self_attn", "model.layers.0", "layers.*.mlp.shared_expert".
    ArgumentError: each value that means nothing, by name.
    """

    form: str
    group_size: int | None = None
    block: tuple[int, int] | None = None
    parts: tuple[str, ...] | None = None
    modules_to_not_convert: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("block", "parts", "modules_to_not_convert"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        if faults := list(self._faults()):
            raise ArgumentError("quantization_config: values refused", faults=faults)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        """The fields by name.  ArgumentError: an unknown one, or what the class itself refuses."""
        known = [field.name for field in fields(cls)]
        faults = [Fault(str(name), "unknown field", _nearest(str(name), known)) for name in given if name not in known]
        faults += [Fault("form", "missing", _one_of(FORMS))] if "form" not in given else []
        if faults:
            raise ArgumentError("quantization_config: fields refused", faults=faults)
        return cls(**given)

    @property
    def weight_form(self) -> Form:
        match self.form:
            case "int8":
                return Int8()
            case "int4":
                return PackedInt4() if self.group_size is None else PackedInt4(self.group_size)
            case "fp8":
                return BlockFp8() if self.block is None else BlockFp8(self.block)
            case _:
                return Mxfp4()

    @property
    def wanted_parts(self) -> tuple[str, ...]:
        return self.parts or PUBLISHED_PARTS.get(self.form, PARTS)

    def _faults(self) -> Iterator[Fault]:
        if self.form not in FORMS:
            yield Fault(f"form={self.form!r}", "unknown", _one_of(FORMS))
        if self.group_size is not None and not (self.form == "int4" and _positive(self.group_size, 8)):
            yield Fault(f"group_size={self.group_size!r}", "refused", "it is of int4, and a multiple of 8")
        if self.block is not None and not (self.form == "fp8" and _pair(self.block)):
            yield Fault(f"block={self.block!r}", "refused", "it is of fp8, and two numbers: rows and columns")
        if self.parts is not None and not (_names(self.parts) and self.parts and set(self.parts) <= set(PARTS)):
            yield Fault(f"parts={self.parts!r}", "refused", f"expected a list of some of {', '.join(PARTS)}")
        if not _names(self.modules_to_not_convert):
            yield Fault(
                f"modules_to_not_convert={self.modules_to_not_convert!r}", "refused", "expected a list of names"
            )


def _one_of(known: tuple[str, ...]) -> str:
    return f"expected one of {', '.join(known)}"


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def _positive(value: object, multiple: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0 and value % multiple == 0


def _pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_positive(number) for number in value)


def _names(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) and name for name in value)
