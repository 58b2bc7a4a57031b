"""New files written past the page cache."""

import errno
import os
import random

import pytest

from moebius.checkpoint import direct
from moebius.checkpoint.direct import BLOCK, BUFFER_BYTES, new_file

LENGTHS = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1, 2 * BUFFER_BYTES + 77)


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(direct, "LEAST_BYTES", 0)


def write(path, content, pieces):
    with new_file(path, len(content)) as file:
        for start in range(0, len(content), pieces):
            file.write(memoryview(content)[start : start + pieces])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("pieces", [BUFFER_BYTES * 3, 1 << 20, 70_001])
def test_the_file_holds_what_was_written(tmp_path, always, length, pieces):
    content = random.Random(length).randbytes(length)
    write(tmp_path / "new", content, pieces)
    assert (tmp_path / "new").read_bytes() == content
    assert (tmp_path / "new").stat().st_mode & 0o111 == 0


def test_large_files_alone_go_past_the_cache(tmp_path, monkeypatch):
    flags, create = [], os.open
    monkeypatch.setattr(os, "open", lambda path, flag, *mode: (flags.append(flag), create(path, flag, *mode))[1])
    monkeypatch.setattr(direct, "LEAST_BYTES", 100)
    write(tmp_path / "small", bytes(99), 99)
    write(tmp_path / "large", bytes(100), 100)
    assert [bool(flag & os.O_DIRECT) for flag in flags] == [False, True]


@pytest.mark.parametrize("leaves_the_file", [True, False])
def test_a_file_system_that_refuses_direct_writes_gets_cached_ones(tmp_path, always, monkeypatch, leaves_the_file):
    create = os.open

    def refusing(path, flag, *mode):
        if flag & os.O_DIRECT:
            if leaves_the_file:
                os.close(create(path, flag & ~os.O_DIRECT, *mode))
            raise OSError(errno.EINVAL, "Invalid argument")
        return create(path, flag, *mode)

    monkeypatch.setattr(os, "open", refusing)
    write(tmp_path / "new", b"words" * 1000, 777)
    assert (tmp_path / "new").read_bytes() == b"words" * 1000


def test_an_older_file_is_never_touched(tmp_path, always):
    (tmp_path / "old").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write(tmp_path / "old", b"words", 5)
    assert (tmp_path / "old").read_bytes() == b"mine"


def test_a_length_that_was_not_announced_is_refused(tmp_path, always):
    with pytest.raises(AssertionError, match="5 bytes were written, expected 6"), new_file(tmp_path / "new", 6) as file:
        file.write(memoryview(b"words"))
