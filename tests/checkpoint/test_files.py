"""Headers are checked to the last field; whatever bytes a shard holds, the answer is tensors or one CheckpointError."""

import json
import random
from pathlib import Path

import pytest
import torch

from moebius.checkpoint.files import DTYPES, open_files, parse_json
from moebius.errors import CheckpointError
from tests.checkpoint.folders import numbered, write

FLOAT = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def shard(folder: Path, header, data: bytes = bytes(16)) -> Path:
    """A folder with one file of this header (an object, or raw text) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_files(folder)
    return str(caught.value)


def test_what_the_library_writes_is_read(tmp_path):
    tensors = {
        "a": numbered(2, 3),
        "b.c": numbered(4).to(torch.bfloat16),
        "d": torch.tensor(True),
        "e": torch.zeros(0, 3),
    }
    files = open_files(write(tmp_path, tensors))
    seen = {name: (info.dtype, info.shape, info.nbytes) for name, info in files.tensors.items()}
    assert seen == {name: (str(t.dtype)[6:], tuple(t.shape), t.nbytes) for name, t in tensors.items()}
    raw = (tmp_path / "model.safetensors").read_bytes()
    at = files.tensors["b.c"].offset
    assert raw[at : at + 8] == tensors["b.c"].view(torch.uint8).numpy().tobytes()


def test_every_dtype_has_a_torch_name():
    for name, size in DTYPES.values():
        assert getattr(torch, name).itemsize == size


def test_a_header_may_have_metadata_and_padding(tmp_path):
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": FLOAT}).encode() + b"   "
    assert list(open_files(shard(tmp_path, header)).tensors) == ["a"]


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"a": FLOAT | {"extra": 1}}, "expected exactly dtype, shape, data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2, 2]}}, "expected exactly dtype, shape, data_offsets"),
        ({"a": [1, 2]}, "expected exactly dtype, shape, data_offsets"),
        ({"a": FLOAT | {"dtype": "F31"}}, "unknown dtype 'F31'"),
        ({"a": FLOAT | {"dtype": 5}}, "unknown dtype 5"),
        ({"a": FLOAT | {"shape": [2, -2]}}, "are not counts"),
        ({"a": FLOAT | {"shape": [2, 2.0]}}, "are not counts"),
        ({"a": FLOAT | {"shape": [True, 4]}}, "are not counts"),
        ({"a": FLOAT | {"shape": "22"}}, "are not counts"),
        ({"a": FLOAT | {"data_offsets": [0, 16, 32]}}, "are not counts"),
        ({"a": FLOAT | {"data_offsets": [16, 0]}}, "are not counts"),
        ({"a": FLOAT | {"shape": [1 << 64]}}, "are not counts"),
        ({"a": FLOAT | {"shape": [3, 2]}}, "needs 24 bytes, offsets give 16"),
        ({"a": FLOAT | {"data_offsets": [4, 20]}}, "bytes leave a gap"),
        ({"a": FLOAT, "b": FLOAT}, "bytes overlap"),
        ({"": FLOAT}, "the name is empty or holds control characters"),
        ({"a\n": FLOAT}, "the name is empty or holds control characters"),
        ({"__metadata__": {"format": 1}, "a": FLOAT}, "__metadata__ is not a map"),
        ({"__metadata__": None, "a": FLOAT}, "__metadata__ is not a map"),
        (b'{"a": {"dtype": "F32"', "broken JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
        (b"{" + b'"a":{' * 100_000, "nested too deeply"),
        (b'{"\xff": 1}', "not UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "integer string conversion"),
        (b"[1, 2]", "not safetensors"),
    ],
)
def test_a_header_that_is_not_exact_is_refused(tmp_path, header, says):
    message = refusal(shard(tmp_path, header))
    assert says in message
    assert "model.safetensors" in message


@pytest.mark.parametrize(("data", "says"), [(bytes(15), "truncated"), (bytes(17), "surplus bytes"), (b"", "truncated")])
def test_the_data_must_end_where_the_header_says(tmp_path, data, says):
    assert says in refusal(shard(tmp_path, {"a": FLOAT}, data))


@pytest.mark.parametrize("raw", [b"", b"1234567", b"\xff" * 64, (1 << 62).to_bytes(8, "little") + b"{}"])
def test_what_is_too_short_or_absurdly_long_is_refused_without_allocating(tmp_path, raw):
    (tmp_path / "model.safetensors").write_bytes(raw)
    assert "truncated" in refusal(tmp_path) or "not safetensors" in refusal(tmp_path)


def test_a_folder_instead_of_a_file_and_a_pipe_are_refused(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    assert "model.safetensors: unreadable" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["[]", '{"weight_map": {}}', '{"weight_map": []}', "{}", "null", "{"])
def test_an_index_without_a_map_is_refused(tmp_path, text):
    write(tmp_path, {"a": numbered(2), "b": numbered(2)}, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(tmp_path)


def test_two_sets_of_weights_in_one_folder_are_refused(tmp_path):
    write(tmp_path, {"a": numbered(2), "b": numbered(2)}, shards=2)
    write(tmp_path, {"a": numbered(2)})
    assert "two sets of weights" in refusal(tmp_path)


@pytest.mark.parametrize("raw", [b'{"a": 1, "a": 2}', b'{"a": Infinity}', b"\xff", b"{", b"[" * 100_000])
def test_json_is_read_strictly(raw):
    with pytest.raises(ValueError, match=r"twice|not JSON|not UTF-8|broken JSON"):
        parse_json(raw)


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """One to three small damages: a byte flipped, a piece cut out, doubled, or replaced."""
    for _ in range(rng.randint(1, 3)):
        at, length = rng.randrange(len(raw)), rng.randint(1, 8)
        piece = (bytes([raw[at] ^ 1 << rng.randrange(8)]), b"", raw[at : at + length] * 2, rng.randbytes(length))
        raw = raw[:at] + rng.choice(piece) + raw[at + length :]
    return raw


def test_damaged_files_give_the_same_tensors_or_one_error(tmp_path):
    """A short slice of fuzzing: no crash, and never a tensor of another place in the file."""
    write(tmp_path, {f"layers.{n}.w": numbered(2, 2, start=n) for n in range(3)})
    path = tmp_path / "model.safetensors"
    raw, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(1500):
        path.write_bytes(mutated(raw, rng))
        try:
            files = open_files(tmp_path)
        except CheckpointError:
            refused += 1
        else:
            size = path.stat().st_size
            assert sum(info.nbytes for info in files.tensors.values()) == size - files.shards[0].data_start
    assert refused > 900
