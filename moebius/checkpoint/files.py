"""Safetensors shards and their index: headers only, checked strictly, without torch.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data
(safetensors README, "Format"). Everything that can be wrong with a set of files is gathered and raised once.
"""

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moebius.errors import CheckpointError, Fault

MAX_COUNT = 1 << 63
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_NAME = 500  # characters of a tensor's name: more would fill a screen with each message
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The format's dtype codes -> (torch's dtype name, bytes an element). Codes below a byte (F4, F6) are refused by name.
DTYPES: Mapping[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
CODES: Mapping[str, str] = {name: code for code, (name, _) in DTYPES.items()}
ITEM_BYTES: Mapping[str, int] = dict(DTYPES.values())

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # as JSON spells one half of a character

# What people put in a shard's place, by its first bytes.
_IMPOSTORS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file", "fetch it: git lfs pull, or hf download"),
    (b"<", "an HTML page, not the file", "the download failed: fetch it again (is a login needed?)"),
    (b"PK\x03\x04", "a pickled PyTorch file", "convert it to safetensors; pickle is never opened"),
    (b"\x80\x02", "a pickled PyTorch file", "convert it to safetensors; pickle is never opened"),
    (b"GGUF", "a GGUF file", "use the safetensors files of the model"),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor.  dtype: torch's name.  offset: bytes from the start of `file` (a plain file name)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str
    offset: int


@dataclass(frozen=True)
class ShardFile:
    """One checked shard.  header: its raw bytes with the length in front, so that a save can write the same ones.

    identity: (inode, mtime_ns), compared again at reading, so that no file is swapped between plan and load.
    """

    path: Path
    size: int
    identity: tuple[int, int]
    header: bytes
    tensors: tuple[TensorInfo, ...]

    @property
    def data_start(self) -> int:
        return len(self.header)


@dataclass(frozen=True)
class CheckpointFiles:
    """The checked files of one checkpoint folder.  index: the raw bytes of its index file, None for a single file."""

    folder: Path
    shards: tuple[ShardFile, ...]
    tensors: Mapping[str, TensorInfo]
    index: bytes | None = field(repr=False, default=None)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_files(folder: str | os.PathLike[str]) -> CheckpointFiles:
    """Reads and checks every header in `folder`.

    Raises CheckpointError with all faults: files missing, broken or not safetensors; index and headers that disagree.
    """
    root = Path(folder)
    faults: list[Fault] = []
    files = _open_set(root, faults)
    if faults or files is None:
        raise fault_error(root, faults)
    return files


def fault_error(folder: Path, faults: list[Fault], advice: str = "") -> CheckpointError:
    """The one error that carries all `faults` of a checkpoint."""
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    return CheckpointError(f"{count} in {folder}; no weight was read", faults=faults, advice=advice)


def _open_set(root: Path, faults: list[Fault]) -> CheckpointFiles | None:
    single, index = root / SINGLE_FILE, root / INDEX_FILE
    if single.is_file() and index.is_file():
        detail = f"{INDEX_FILE} is there too; keep the one that belongs to the model"
        faults.append(Fault(SINGLE_FILE, "two sets of weights", detail))
        return None
    if os.path.lexists(single):
        return _open_single(root, faults)
    if os.path.lexists(index):
        return _open_sharded(root, faults)
    faults.append(_no_weights(root))
    return None


def _open_single(root: Path, faults: list[Fault]) -> CheckpointFiles | None:
    shard = _read_shard(root, SINGLE_FILE, faults)
    return shard and CheckpointFiles(root, (shard,), {tensor.name: tensor for tensor in shard.tensors})


def _open_sharded(root: Path, faults: list[Fault]) -> CheckpointFiles | None:
    weight_map, raw = _read_index(root, faults)
    names = [name for name in sorted(set(weight_map.values())) if _plain_name(name, faults)]
    if faults:
        return None
    shards = [shard for name in names if (shard := _open_named(root, name, weight_map, faults))]
    tensors = _compare(weight_map, shards, faults)
    return CheckpointFiles(root, tuple(shards), tensors, raw)


def _open_named(root: Path, name: str, weight_map: Mapping[str, str], faults: list[Fault]) -> ShardFile | None:
    if os.path.lexists(root / name):
        return _read_shard(root, name, faults)
    keys = [key for key, file in weight_map.items() if file == name]
    shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    faults.append(Fault(name, "missing", f"{INDEX_FILE} says that it holds {len(keys)} tensors ({shown}); fetch it"))
    return None


def _no_weights(root: Path) -> Fault:
    pickles = sorted(path.name for path in root.glob("*.bin")) + sorted(path.name for path in root.glob("*.pt*"))
    if pickles:
        detail = "it could run code and is never opened; if you trust it: load it with transformers, save_pretrained()"
        return Fault(pickles[0], "a pickled PyTorch file", detail)
    if ggufs := sorted(path.name for path in root.glob("*.gguf")):
        return Fault(ggufs[0], "a GGUF file", "only safetensors are opened; fetch the model's safetensors files")
    return Fault(SINGLE_FILE, "missing", f"neither it nor {INDEX_FILE} is in the folder")


# --- the index ---------------------------------------------------------------------------------------------------


def _read_index(root: Path, faults: list[Fault]) -> tuple[Mapping[str, str], bytes]:
    try:
        raw = read_regular(_checked_path(root, INDEX_FILE))
        index = parse_json(raw)
    except (OSError, ValueError) as error:
        faults.append(Fault(INDEX_FILE, "unreadable", f"{reason(error)}; fetch it again"))
        return {}, b""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        faults.append(Fault(INDEX_FILE, "no weight_map", "expected an object from tensor names to shard file names"))
        return {}, raw
    wrong = [key for key, name in weight_map.items() if not isinstance(name, str)]
    if wrong:
        found = type(weight_map[wrong[0]]).__name__
        detail = f"expected text for {shown(wrong[0])}, found {found}; {len(wrong)} such keys"
        faults.append(Fault(INDEX_FILE, "not a file name", detail))
    unfit = [key for key in weight_map if _unfit_name(key)]
    faults.extend(Fault(INDEX_FILE, "not a tensor's name", f"{shown(key)}: {_unfit_name(key)}") for key in unfit)
    return ({} if wrong or unfit else weight_map), raw


def _plain_name(name: str, faults: list[Fault]) -> bool:
    plain = name.endswith(".safetensors") and not any(char in "/\\" or not char.isprintable() for char in name)
    if not plain:
        faults.append(
            Fault(INDEX_FILE, "not a shard's name", f"{shown_name(name)}; expected *.safetensors inside the folder")
        )
    return plain


def _compare(weight_map: Mapping[str, str], shards: list[ShardFile], faults: list[Fault]) -> dict[str, TensorInfo]:
    """Index and headers must say the same, both ways, and each key lies in one shard."""
    found: dict[str, TensorInfo] = {}
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        if tensor.name in found:
            detail = f"in {found[tensor.name].file} and in {tensor.file}"
            faults.append(Fault(tensor.name, "in two shards", detail))
        elif weight_map.get(tensor.name) != tensor.file:
            said = weight_map.get(tensor.name, "nothing of it")
            faults.append(
                Fault(tensor.name, "index and shard disagree", f"{INDEX_FILE} says {said}; it is in {tensor.file}")
            )
        found.setdefault(tensor.name, tensor)
    opened = {shard.path.name for shard in shards}
    lost = [key for key, name in weight_map.items() if key not in found and name in opened]
    faults.extend(Fault(key, "missing", f"{INDEX_FILE} says {weight_map[key]}, which does not hold it") for key in lost)
    return found


# --- one shard ---------------------------------------------------------------------------------------------------


def _read_shard(root: Path, name: str, faults: list[Fault]) -> ShardFile | None:
    """The shard, or None with the reason added to `faults`."""
    try:
        path = _checked_path(root, name)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return _read_open_shard(path, descriptor, faults)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        faults.append(Fault(name, "unreadable", reason(error)))
        return None


def _read_open_shard(path: Path, descriptor: int, faults: list[Fault]) -> ShardFile | None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    header = _read_header(descriptor, status.st_size)
    before = len(faults)
    tensors = _parse_header(path.name, header, status.st_size, faults)
    identity = (status.st_ino, status.st_mtime_ns)
    return ShardFile(path, status.st_size, identity, header, tensors) if len(faults) == before else None


def _read_header(descriptor: int, size: int) -> bytes:
    start = os.pread(descriptor, 64, 0)
    if size < 8:
        raise ValueError(f"truncated: at least 8 bytes expected, the file has {size}; fetch it again")
    length = int.from_bytes(start[:8], "little")
    if length > min(MAX_HEADER_BYTES, size - 8) or start[8:9] != b"{":
        raise ValueError(_not_a_header(start, length, size))
    return os.pread(descriptor, 8 + length, 0)


def _not_a_header(start: bytes, length: int, size: int) -> str:
    """What stands at the beginning of a file that has no header there."""
    for magic, what, advice in _IMPOSTORS:
        if start.lstrip().startswith(magic):
            return f"{what}; {advice}"
    if length <= min(MAX_HEADER_BYTES, size - 8):
        return "not safetensors: the header should begin with '{'"
    if length > MAX_HEADER_BYTES:
        limit = f"the format's limit is {MAX_HEADER_BYTES:,}"
        return f"truncated or not safetensors: the header claims {length:,} bytes, {limit}; fetch it again"
    return f"truncated: {8 + length:,} bytes expected for the header alone, the file has {size:,}; fetch it again"


def _parse_header(file: str, header: bytes, size: int, faults: list[Fault]) -> tuple[TensorInfo, ...]:
    try:
        entries = parse_json(header[8:])
    except ValueError as error:
        raise ValueError(f"damaged header: {error}; fetch it again") from error
    if not entries.keys() - {"__metadata__"}:
        raise ValueError("its header names no tensor; fetch it again")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        faults.append(Fault(file, "header", "__metadata__ is not a map from strings to strings"))
    infos = [info for name, entry in entries.items() if (info := _parse_entry(file, name, entry, len(header), faults))]
    if len(infos) == len(entries):
        _check_extents(file, infos, len(header), size, faults)
    return tuple(infos)


def _parse_entry(file: str, name: str, entry: Any, data_start: int, faults: list[Fault]) -> TensorInfo | None:
    wrong = _entry_fault(name, entry)
    if wrong:
        faults.append(Fault(shown_name(name), "header", f"{file}: {wrong}"))
        return None
    begin, end = entry["data_offsets"]
    return TensorInfo(name, DTYPES[entry["dtype"]][0], tuple(entry["shape"]), end - begin, file, data_start + begin)


def _entry_fault(name: str, entry: Any) -> str:
    """What is wrong with one entry of a header, or nothing."""
    if unfit := _unfit_name(name):
        return unfit
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return "expected exactly dtype, shape, data_offsets"
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        return f"unknown dtype {shown(entry['dtype'])}; known: {', '.join(DTYPES)}"
    offsets = entry["data_offsets"]
    if not _counts(entry["shape"]) or not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"shape {shown(entry['shape'])} or data_offsets {shown(offsets)} are not counts"
    expected = math.prod(entry["shape"]) * DTYPES[entry["dtype"]][1]
    found = offsets[1] - offsets[0]
    return (
        ""
        if found == expected
        else f"shape {shown(entry['shape'])} {entry['dtype']} needs {expected} bytes, offsets give {found}"
    )


def _unfit_name(name: str) -> str:
    """Why a tensor cannot have this name, or nothing."""
    if not name or not name.isprintable():
        return "the name is empty or holds control characters"
    return f"the name has {len(name):,} characters; the limit is {MAX_NAME}" if len(name) > MAX_NAME else ""


def _counts(values: Any) -> bool:
    if not isinstance(values, list) or not {*map(type, values)} <= {int}:  # headers have many: no Python loop
        return False
    return min(values, default=0) >= 0 and max(values, default=0) < MAX_COUNT


def _check_extents(file: str, infos: list[TensorInfo], data_start: int, size: int, faults: list[Fault]) -> None:
    """The tensors cover the data from its start to the end of the file, without overlap and without gaps."""
    end, before = data_start, "the header"
    for info in sorted(infos, key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            what = "bytes overlap" if info.offset < end else "bytes leave a gap"
            detail = f"{file}: begins at byte {info.offset}, {before} ends at {end}"
            faults.append(Fault(info.name, what, detail))
        end, before = max(end, info.offset + info.nbytes), info.name
    if end != size:
        what = "truncated" if size < end else "surplus bytes"
        faults.append(Fault(file, what, f"{end:,} bytes expected, the file has {size:,}; fetch it again"))


# --- shared with whoever reads a model folder ----------------------------------------------------------------------


def read_regular(path: Path) -> bytes:
    """A JSON file, whole.  Raises ValueError for a pipe, a device, or more bytes than even a header may have."""
    with open(path, "rb", opener=_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > MAX_HEADER_BYTES:
            raise ValueError(f"{status.st_size:,} bytes; the limit is {MAX_HEADER_BYTES:,}")
        return file.read()


def _without_waiting(path: str, flags: int) -> int:
    """Opens a pipe too, to whose other end nobody may ever come."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def parse_json(raw: bytes) -> Any:
    """JSON as strict as a header must be: UTF-8, no key twice, no NaN.  Raises ValueError with one clear line."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        if _SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # a half alone cannot be: nor printed, nor saved
        return value
    except UnicodeEncodeError as error:
        raise ValueError("broken JSON: half a surrogate pair") from error
    except RecursionError as error:
        raise ValueError("broken JSON: nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        raise ValueError(f"broken JSON: {what} at line {error.lineno}, column {error.colno}") from error


def reason(error: OSError | ValueError) -> str:
    """Why a file cannot be read, in words, without numbers and paths."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def shown(value: object, limit: int = 80) -> str:
    """As JSON writes it, roughly, and never longer than a line."""
    text = {"True": "true", "False": "false", "None": "null"}.get(repr(value), repr(value))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def shown_name(name: str) -> str:
    """A name out of a file, as a message can hold it."""
    return name if name.isprintable() and len(name) <= MAX_NAME else shown(name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {shown(twice)} stands twice in one object")
    return entries


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _checked_path(root: Path, name: str) -> Path:
    """`root / name`, refused if links lead out of the folder (or, in the hub's cache, out of the model's blobs)."""
    path = root / name
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise ValueError(f"a link out of the folder, to {real}; expected a file inside {home}")
    return path
