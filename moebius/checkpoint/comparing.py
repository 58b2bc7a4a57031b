"""What a conversion expects against what the files hold: missing keys, gaps, shapes, dtypes.  No torch."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from moebius.checkpoint.conversion import Conversion, Source
from moebius.checkpoint.encodings import FORM_NAMES, Stored
from moebius.errors import Fault

FLOATS = ("float64", "float32", "float16", "bfloat16")  # among these a cast is allowed; the plan shows it
NAMED_KEYS = 2  # beyond this many missing or surplus keys of one list, one line says which ids are there


class Expected(Protocol):
    """What is compared against: a target of the plan."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def aliases(self) -> tuple[str, ...]: ...


def compare_conversion(
    conversion: Conversion, tensors: Mapping[str, Stored], targets: Mapping[str, Expected]
) -> list[Fault]:
    """All that is wrong with the sources of one conversion."""
    dtype = targets[conversion.targets[0]].dtype
    faults = [fault for group in conversion.sources for fault in _missing(group, tensors, dtype)]
    present = [source for group in conversion.sources for source in group if source.key in tensors]
    faults += [fault for source in present if (fault := _shape(source, tensors[source.key]))]
    return faults + _dtypes([tensors[source.key] for source in present], dtype)


def compare_double(info: Stored, target: Expected, tensors: Mapping[str, Stored]) -> Fault | None:
    """A second copy of a tied weight must look like the first; that the bytes are equal is checked at loading."""
    first = next((tensors[key] for key in (target.name, *target.aliases) if key in tensors and key != info.name), None)
    if first is None or (first.shape, first.dtype) == (info.shape, info.dtype):
        return None
    detail = f"{_seen(info)}; it is tied to {first.name}, {_seen(first)}"
    return Fault(info.name, "tied weights differ", detail)


def gathered(faults: Iterable[Fault], stored: Iterable[str], expected: Iterable[str]) -> list[Fault]:
    """The faults, with many missing (or unexpected) keys as one where the other side knows nothing of that name.

    stored: the keys in the files.  expected: the keys that the model asks for.
    """
    known = {"missing": _prefixes(stored), "unexpected": _prefixes(expected)}
    groups: dict[tuple[str, str], list[Fault]] = defaultdict(list)
    for fault in faults:
        name = _unknown_part(fault.where, known[fault.what]) if fault.what in known else fault.where
        groups[fault.what, name].append(fault)
    return [fault for (_, name), group in groups.items() for fault in _joined(name, group)]


def _joined(name: str, group: list[Fault]) -> list[Fault]:
    if len(group) <= NAMED_KEYS or name == group[0].where:
        return group
    first = group[0]
    return [Fault(f"{name}.*", first.what, f"{len(group)} names, such as {first.where}: {first.detail}")]


def _prefixes(keys: Iterable[str]) -> set[str]:
    """Every name that stands at the head of a key: model, model.layers, model.layers.0, ..."""
    return {".".join(parts[:end]) for key in keys for parts in [key.split(".")] for end in range(1, len(parts) + 1)}


def _unknown_part(key: str, known: set[str]) -> str:
    """The shortest head of the key that is not known; the key itself if all of it is."""
    parts = key.split(".")
    heads = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((head for head in heads if head not in known), key)


def ranges(ids: Iterable[int]) -> str:
    """0-2, 4-7"""
    spans: list[list[int]] = []
    for number in sorted(set(ids)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans) or "none"


def _missing(group: Sequence[Source], tensors: Mapping[str, Stored], dtype: str) -> list[Fault]:
    missing = [source for source in group if source.key not in tensors]
    if not missing:
        return []
    expected = f"expected {list(missing[0].layout.shape)} {dtype}"
    if group[0].index is None:
        return [Fault(source.key, "missing", expected) for source in missing]
    found = ranges(source.index for source in group if source.key in tensors and source.index is not None)
    ids = f"ids found: {found}; the model holds 0-{len(group) - 1}"
    if len(missing) <= NAMED_KEYS and len(missing) < len(group):
        return [Fault(source.key, "missing", f"{expected}; {ids}") for source in missing]
    what = "missing" if found == "none" else "gap"
    return [Fault(_starred(group), what, f"{expected}; {ids}")]


def _starred(group: Sequence[Source]) -> str:
    """The keys of a list with `*` for their index: the segment in which the first two differ."""
    first, second = (source.key.split(".") for source in (*group, *group)[:2])
    if len(group) == 1:
        return group[0].key
    return ".".join(a if a == b else "*" for a, b in zip(first, second, strict=True))


def _shape(source: Source, info: Stored) -> Fault | None:
    if source.layout.shape == info.shape:
        return None
    return Fault(info.name, "shape", f"expected {list(source.layout.shape)}, found {_seen(info)} in {info.file}")


def _dtypes(infos: Sequence[Stored], expected: str) -> list[Fault]:
    if not infos:
        return []
    common = Counter(info.dtype for info in infos).most_common(1)[0][0]
    faults = [
        Fault(info.name, "dtype", f"found {info.dtype} in {info.file}; its {len(infos) - 1} siblings are {common}")
        for info in infos
        if info.dtype != common
    ]
    if common != expected and not (common in (*FLOATS, *FORM_NAMES) and expected in FLOATS):
        detail = f"found {common} in {infos[0].file}, expected {expected}; {_why_not(common, infos[0].name)}"
        faults.append(Fault(infos[0].name, "dtype", detail))
    return faults


def _why_not(dtype: str, name: str) -> str:
    """Why a tensor of this dtype is not cast."""
    if dtype == "float8_e4m3fn":
        return f"its scales, {name}_scale_inv, are not in the files"
    return "only floats are cast"


def _seen(info: Stored) -> str:
    return f"{list(info.shape)} {info.dtype}"
