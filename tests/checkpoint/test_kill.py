"""A save that fails or dies at any moment: the folder holds the old set or the new one, and the next save works."""

import errno
import os
import random
import tempfile
import time
from pathlib import Path

import pytest

from moebius import SaveError
from tests.checkpoint import killing
from tests.checkpoint.killing import Case, assert_clean, make, operations, save, save_unflushed, seed_in, watched

CASES = {
    "exchanged": Case(),
    "in place": Case(exchanges=False),
    "one file in place": Case(exchanges=False, shards=1),
    "new": Case(fresh=True),
}
CLEARING = {
    "flock",
    "unlink",
    "rmdir",
    "scandir",
    "readlink",
    "exchange",
    "listdir",
}  # where these fail, something may be left
cases = pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))


@pytest.fixture(scope="module", autouse=True)
def _server():
    killing.start_server()


@pytest.fixture
def folder(tmp_path):
    """In memory, where that can be: these tests make and remove many thousand files."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path / "parent" / "model"
        return
    with tempfile.TemporaryDirectory(dir=memory) as place:
        yield Path(place) / "parent" / "model"


@pytest.fixture
def folder_on_disk(tmp_path):
    return tmp_path / "parent" / "model"


def count_of(folder, case: Case) -> int:
    """How many file operations a save makes; the folder is made anew by every call."""
    other = folder.parent.parent / "counted" / "model"
    make(other, case)
    return len(operations(other, 1, case))


def old(folder, case: Case) -> None:
    """The folder, however it was left, holds set 0 again."""
    if case.fresh:
        for path in sorted(folder.parent.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    elif folder.exists():
        save_unflushed(folder, 0, case)
    else:
        make(folder, case)


def failing_save(folder, case: Case, fail, *, after: bool = False) -> tuple[str, list[str]]:
    """What a save of set 1 says (nothing, if it works), and its operations."""
    with watched(case, fail, after=after) as names:
        try:
            save(folder, 1, case)
        except (SaveError, KeyboardInterrupt) as error:
            return str(error) or "interrupted", names
    return "", names


def assert_next_save_works(folder, case: Case) -> None:
    save_unflushed(folder, 2, case)
    assert seed_in(folder, case, (2,)) == 2
    assert_clean(folder, case)


def test_every_file_reaches_the_disk_before_its_folder_and_that_before_its_new_name(folder):
    """In this order a power failure, too, leaves the old set or the new one."""
    make(folder, Case())
    names = operations(folder, 1, Case())
    writes = [at for at, name in enumerate(names) if name in ("pwrite", "ftruncate", "link", "symlink")]
    swap = next(at for at, name in enumerate(names) if name == "exchange" and at > max(writes))
    assert names[swap - 3 : swap] == ["open", "fsync", "close"]
    written = names[names.index("statvfs") : swap]
    assert written.count("fsync") == 2 + 3 + 1  # shards; index, config and sums; the folder
    assert "fsync" in names[swap:]


@cases
@pytest.mark.parametrize(
    ("raised", "after"),
    [(OSError(errno.EIO, "Input/output error"), False), (KeyboardInterrupt, False), (KeyboardInterrupt, True)],
    ids=["EIO", "Ctrl-C before", "Ctrl-C after"],
)
def test_an_error_at_any_operation_leaves_a_whole_set_and_nothing_beside(folder, case, raised, after):
    outcomes = set()
    for at in range(count_of(folder, case)):
        old(folder, case)

        def fail(n, name, at=at):
            if n == at:
                raise raised

        said, names = failing_save(folder, case, fail, after=after)
        found = seed_in(folder, case, (0, 1))
        if isinstance(raised, OSError):
            assert (found == 1) == (not said or "holds the new" in said), (at, names[at], said)
        if not after and names[at] not in CLEARING and not (said and found == 1):
            assert_clean(folder, case)
        outcomes.add(found)
        assert_next_save_works(folder, case)
    assert outcomes == {None if case.fresh else 0, 1}


@pytest.mark.parametrize("case", [Case(), Case(exchanges=False)], ids=["exchanged", "in place"])
def test_a_disk_that_fails_from_any_operation_on_leaves_a_whole_set(folder, case):
    for at in range(count_of(folder, case)):
        old(folder, case)

        def fail(n, name, at=at):
            if n >= at:
                raise OSError(errno.ENOSPC, "No space left on device")

        said, names = failing_save(folder, case, fail)
        found = seed_in(folder, case, (0, 1))
        assert (found == 1) == (not said or "holds the new" in said), (at, names[at], said)
        assert_next_save_works(folder, case)


@cases
def test_a_death_at_any_operation_leaves_a_whole_set(folder, case):
    outcomes = set()
    for at in range(count_of(folder, case)):
        old(folder, case)
        killing.die_at(at, folder, 1, case)
        outcomes.add(seed_in(folder, case, (0, 1)))
        assert_next_save_works(folder, case)
    assert outcomes == {None if case.fresh else 0, 1}


@pytest.mark.parametrize("case", [Case(), Case(exchanges=False)], ids=["exchanged", "in place"])
def test_an_end_at_any_time_leaves_a_whole_set(folder_on_disk, case):
    kill_many(folder_on_disk, case, 10)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", [Case(), Case(exchanges=False)], ids=["exchanged", "in place"])
def test_a_thousand_kills(folder_on_disk, case):
    kill_many(folder_on_disk, case, 500)


def kill_many(folder, case: Case, times: int) -> None:
    """Real flushes, real threads: a child's save is killed anywhere between its start and its end."""
    make(folder, case)
    killing.run(save, folder, 0, case)
    started = time.perf_counter()
    killing.run(save, folder, 0, case)
    seconds = time.perf_counter() - started
    choose, killed, found = random.Random(1), 0, set()
    while killed < times:
        before, after = seed_in(folder, case, (0, 2, 4)), 2 + 2 * (killed % 2)
        killed += killing.kill_somewhere(folder, 1, case, seconds, choose)
        found.add(seed_in(folder, case, (before, 1)) == 1)
        save_unflushed(folder, after, case)
        assert seed_in(folder, case, (after,)) == after
        assert_clean(folder, case)
    print(f"{killed} kills within {seconds:.3f} s")
    assert found == {False, True}
