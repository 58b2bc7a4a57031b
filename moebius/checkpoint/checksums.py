"""Checksums of a checkpoint's files: written beside them by a save that is asked to, compared by a load.  No torch.

SHA256SUMS is what `sha256sum` writes and `sha256sum -c SHA256SUMS` reads: a line a shard, 64 hexadecimal digits, two
blanks, the file's name.  A shard in the hub's cache needs none: its blob is named by its sha256.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from moebius.checkpoint.files import CheckpointFiles, ShardFile, reason
from moebius.checkpoint.pool import run_all
from moebius.checkpoint.reading import opened
from moebius.errors import Fault

SUMS_FILE = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_READ_BYTES = 1 << 20  # of one thread; stays in its cache while it is hashed


def sums(digests: Mapping[str, str]) -> bytes:
    """The content of SHA256SUMS, of {file name: digest}."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()


def check(files: CheckpointFiles, *, threads: int) -> list[Fault]:
    """Reads every shard of which a checksum is known and says which are not what they were.

    A folder without checksums has no faults.  threads: 0 does it all in this one.  Raises CheckpointError if a file
    changed since its header was read.
    """
    listed, faults = _listed(files)
    known = [(shard, listed.get(shard.path.name) or _blob_name(shard)) for shard in files.shards]

    def compare(one: tuple[ShardFile, str]) -> None:
        shard, expected = one
        found = _digest(shard)
        if found != expected:
            faults.append(Fault(shard.path.name, "damaged", f"sha256 {expected} expected, found {found}"))

    run_all([(shard, digest) for shard, digest in known if digest], compare, threads)
    return sorted(faults, key=lambda fault: fault.where)


def _listed(files: CheckpointFiles) -> tuple[Mapping[str, str], list[Fault]]:
    """What SHA256SUMS says of the shards, and what is wrong with it; it may be about other files alone."""
    try:
        lines = (files.folder / SUMS_FILE).read_text().splitlines()
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError) as error:
        return {}, [Fault(SUMS_FILE, "unreadable", reason(error))]
    found = [_LINE.fullmatch(line) for line in lines]
    if wrong := [number for number, match in enumerate(found, 1) if not match]:
        return {}, [Fault(SUMS_FILE, "unreadable", f"line {wrong[0]}: expected 64 hexadecimal digits and a file name")]
    listed = {match[2]: match[1] for match in found if match}
    names = [shard.path.name for shard in files.shards]
    lost = [name for name in names if name not in listed]
    if len(lost) == len(names):
        return {}, []
    return listed, [Fault(name, "no checksum", f"{SUMS_FILE} has those of other shards") for name in lost]


def _blob_name(shard: ShardFile) -> str | None:
    """The sha256 in the name of the hub's blob to which the shard is a link; other blobs are named by a git hash."""
    real = Path(os.path.realpath(shard.path))
    return real.name if real.parent.name == "blobs" and _DIGEST.fullmatch(real.name) else None


def file_digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb", buffering=0) as file:
        return _digest_of(file.fileno())


def _digest(shard: ShardFile) -> str:
    with opened(shard) as descriptor:
        return _digest_of(descriptor)


def _digest_of(descriptor: int) -> str:
    digest, buffer, offset = hashlib.sha256(), memoryview(bytearray(_READ_BYTES)), 0
    while count := os.preadv(descriptor, [buffer], offset):
        digest.update(buffer[:count])
        offset += count
    return digest.hexdigest()
