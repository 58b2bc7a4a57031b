"""What may come out of opening a damaged checkpoint; everything else is a finding, in words."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from moebius.config import DecoderConfig, GroupedQueryAttention, SparseMoe
from moebius.errors import CheckpointError, ConfigError, Fault, MoebiusError
from tests.families import TINY, YARN
from tests.fuzz.bases import Base, base_named
from tests.fuzz.damaged_configs import FIELDS
from tests.fuzz.documents import CONFIG, Files
from tests.fuzz.reference import Expected, UnreadableError, described, read_by_names

KINDS = (CheckpointError, ConfigError)
LINE_LENGTH = 1000  # a line that no terminal shows in one look is none
TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"')
INDEX_SEGMENT = re.compile(r"(?<![^.])[0-9]+(?![^.])")
CONFIG_FIELDS = {name for config in TINY.values() for name in config} | {*YARN, "rope_type", "rope_parameters"}
CONFIG_FIELDS |= {
    *FIELDS.split(),
    "quant_method",
    "weight_block_size",
    "format",
    "config_groups",
    "weights",
    "group_size",
}
NO_NAMES: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Loaded:
    """What opening gave: the config as read, and the model's tensors by name."""

    config: DecoderConfig
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """outcome: "refused", "loaded" or "finding".  detail: the error, or what is wrong."""

    outcome: str
    detail: str = ""

    @property
    def is_finding(self) -> bool:
        return self.outcome == "finding"


def finding(detail: str) -> Verdict:
    return Verdict("finding", detail)


def judge_error(
    error: BaseException, files: Files, base: Base, touched: frozenset[str] = NO_NAMES, harmless: bool = False
) -> Verdict:
    """An error is right if it is of the right kind, fits its lines, and names what is wrong.

    touched: names of which it has to say at least one; none: any name that the files hold will do.
    """
    if not isinstance(error, MoebiusError):
        return finding(f"{type(error).__name__}: {error}")
    if type(error) not in KINDS:
        return finding(f"{type(error).__name__} is not the kind for a checkpoint: {error}")
    if harmless:
        return finding(f"refused, although nothing is wrong: {error}")
    wrong = _unfit_line(error) or _unnamed(error, files, base) or _beside_the_point(error, touched)
    return finding(f"{wrong}; the error: {error}") if wrong else Verdict("refused", str(error))


def judge_load(loaded: Loaded, files: Files, base: Base, wanted: str | None, harmless: bool = False) -> Verdict:
    """A load is right if its tensors are those of the independent reading, and its config is what the file says."""
    try:
        expected = read_by_names(files, wanted)
        undamaged = read_by_names(base.files, wanted) if harmless else expected
    except UnreadableError as error:
        return finding(f"loaded what has no one meaning: {error}")
    except Exception as error:  # noqa: BLE001  # whatever it stumbles over, the loader should have stumbled too
        return finding(f"loaded what the reference cannot read: {type(error).__name__}: {error}")
    wrong = difference(loaded.tensors, expected) or difference(loaded.tensors, undamaged)
    wrong = wrong or _misread(loaded.config, files)
    return finding(f"wrong load: {wrong}") if wrong else Verdict("loaded")


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Expected]) -> str:
    """The first difference between the model's tensors and what they should be; empty if there is none."""
    if found.keys() != expected.keys():
        return f"names {sorted(found.keys() ^ expected.keys())[:4]}"
    for name, tensor in found.items():
        wanted = expected[name]
        if (tensor.shape, tensor.dtype) != (wanted.tensor.shape, wanted.tensor.dtype):
            return f"{name} is {tensor.dtype} {list(tensor.shape)}, not {wanted.tensor.dtype} {[*wanted.tensor.shape]}"
        if not _same_bits(tensor, wanted):
            return f"{name} holds other values"
    return ""


def _same_bits(found: Tensor, wanted: Expected) -> bool:
    ours, theirs = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (found, wanted.tensor))
    if torch.equal(ours, theirs):
        return True
    # what was cast or computed has one NaN as good as another
    ours, theirs = found.double(), wanted.tensor.double()
    return not wanted.copied and torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True)


# --- config ----------------------------------------------------------------------------------------------------------


def _moe(config: DecoderConfig) -> SparseMoe | None:
    return config.moe_layers[0] if config.moe_layers else None


def _grouped(config: DecoderConfig) -> GroupedQueryAttention | None:
    mixer = config.layers[0].mixer
    return mixer if isinstance(mixer, GroupedQueryAttention) else None


def _experts(config: DecoderConfig) -> Any:
    return moe.num_experts if (moe := _moe(config)) else None


def _experts_a_token(config: DecoderConfig) -> Any:
    return moe.top_k if (moe := _moe(config)) else None


def _head_dim(config: DecoderConfig) -> Any:
    return mixer.head_dim if (mixer := _grouped(config)) else None


SAID: Mapping[str, Callable[[DecoderConfig], Any]] = {
    "vocab_size": lambda config: config.vocab_size,
    "hidden_size": lambda config: config.hidden_size,
    "num_hidden_layers": lambda config: len(config.layers),
    "rms_norm_eps": lambda config: config.norm.eps,
    "tie_word_embeddings": lambda config: config.tie_word_embeddings,
    "max_position_embeddings": lambda config: config.max_position_embeddings,
    "num_attention_heads": lambda config: config.layers[0].mixer.num_heads,
    "rope_theta": lambda config: config.layers[0].mixer.rope.theta,
    "head_dim": _head_dim,
    "num_experts": _experts,
    "num_local_experts": _experts,
    "n_routed_experts": _experts,
    "num_experts_per_tok": _experts_a_token,
}
"""Fields of a config.json -> what a DecoderConfig says of them; None where it has no such thing."""


def _misread(config: DecoderConfig, files: Files) -> str:
    raw = files[CONFIG]
    assert isinstance(raw, bytes)
    said = described(raw).text
    for field, read in SAID.items():
        value, found = said.get(field), read(config)
        if None in (value, found):
            continue
        value = float(value) if isinstance(found, float) and type(value) is int else value
        if value != found or isinstance(value, bool) != isinstance(found, bool):
            return f"{CONFIG} says {field} {value!r}, the model has {found!r}"
    return ""


# --- errors ----------------------------------------------------------------------------------------------------------


def _unfit_line(error: MoebiusError) -> str:
    lines = [error.message, error.advice, *(text for fault in error.faults for text in _texts(fault))]
    for line in lines:
        if not line.isprintable():
            return f"a line with control characters: {line[:80]!r}"
        if len(line) > LINE_LENGTH:
            return f"a line of {len(line)} characters: {line[:80]!r}..."
    return ""


def _texts(fault: Fault) -> Iterable[str]:
    return fault.where, fault.what, fault.detail


def _unnamed(error: MoebiusError, files: Files, base: Base) -> str:
    """A fault that is not about a file, a tensor or a field of this checkpoint; empty if all are."""
    known = _names(files) | _base_names(base.name)
    if not error.faults:
        return "" if any(name in error.message for name in (CONFIG, *files)) else "no file is named"
    templates = {_template(name) for name in known}
    unknown = [fault for fault in error.faults if not _known(fault, known, templates)]
    return f"{unknown[0].where!r} is no file, tensor or field here" if unknown else ""


def _known(fault: Fault, known: set[str], templates: set[str]) -> bool:
    """A name in the files, the head of some, one that the config asks for, or a field that configs have."""
    where = _template(fault.where.removesuffix(".*"))
    quantized = {f"{where}_packed", f"{where}_blocks"}  # a weight may be named without what its form adds
    if not templates.isdisjoint({where, *quantized}) or any(name.startswith(f"{where}.") for name in templates):
        return True
    if fault.what in ("missing", "gap") and where.startswith(("model.", "lm_head", "language_model.")):
        return True
    if _shortened(fault.where, known) or all(field in CONFIG_FIELDS for field in fault.where.split(".")):
        return True
    return any(fault.where.endswith((f".{name}", f"{repr(name)[1:]}")) or fault.where == name for name in known)


def _shortened(where: str, known: Iterable[str]) -> bool:
    """A long name of which the beginning is shown: of its last part, if it has several."""
    head = where.strip("'\"").removesuffix("...")
    parts = {head, head.rpartition(".")[2]}
    spellings = (text for name in known for text in (name, repr(name)[1:]))
    return "..." in where and any(part and text.startswith(part) for text in spellings for part in parts)


def _names(files: Files) -> set[str]:
    """Every text in the files' JSON, and the files' own names."""
    names = set(files)
    for content in files.values():
        if isinstance(content, bytes):
            head = content[8 : 8 + int.from_bytes(content[:8], "little")] if content[8:9] == b"{" else content
            names |= {_unescaped(text) for text in TEXT.findall(head[:1_000_000].decode("utf-8", "replace"))}
    return names


@cache
def _base_names(base: str) -> set[str]:
    """What stands in a base's files, and what the model calls its tensors."""
    files = base_named(base).files
    return _names(files) | set(read_by_names(files, None))


def _unescaped(text: str) -> str:
    try:
        return json.loads(f'"{text}"', strict=False) if "\\" in text else text
    except ValueError:
        return text


@lru_cache(1 << 16)
def _template(name: str) -> str:
    return INDEX_SEGMENT.sub("*", name)


def _beside_the_point(error: MoebiusError, touched: frozenset[str]) -> str:
    """Empty if the error names something that was damaged."""
    if not touched:
        return ""
    text = f"{error.message}\n" + "\n".join(str(fault) for fault in error.faults)
    if any(name in text or repr(name)[1:-1][:60] in text for name in touched):
        return ""
    heads = {_template(fault.where.removesuffix(".*")) for fault in error.faults}
    # where nothing of a packed weight is there, the keys of single experts are asked for
    heads |= {head[: head.index("experts.") + 8] for head in heads if ".experts." in head}
    about = any(_template(name).startswith(head) for name in touched for head in heads if head)
    return "" if about else f"none of {sorted(touched)[:6]} is named"
