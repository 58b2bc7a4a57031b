"""Ranks for tests: processes of this machine, one thread each, started once a session, size and kind of device.

A function that ranks run is a module's own, of a module that is quick to import; what is slow to import (transformers)
it imports inside.  Processes are forked from one that has torch already, which importing costs three seconds each.
"""

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

Device = Literal["cpu", "cuda"]
SECONDS = 60.0
GRACE_SECONDS = 2.0
NO_MULTICAST = ("NCCL_NVLS_ENABLE=0", "TORCH_SYMM_MEM_DISABLE_MULTICAST=1", "NVSHMEM_DISABLE_NVLS=1")
"""On a host that others use, NVLink multicast can put GPUs out of service."""
PRELOADED = ["torch.distributed.device_mesh", "torch.distributed.tensor"]

_pools: dict[tuple[int, Device], "Pool"] = {}


def run_ranks(
    size: int, function: Callable[..., Any], *args: Any, seconds: float = SECONDS, device: Device = "cpu"
) -> list[Any]:
    """What function(ranks, *args) gives on each of `size` ranks, in their order; all is pickled on its way.

    ranks: a moebius.distributed.ranks.Ranks whose experts are shared by all of them; a GPU each with device="cuda".
    A rank's exception is raised here, with a note that has the rank and its traceback.  TimeoutError: some are late.
    A pool in which some ranks failed and others did not, or were late, is killed; the next call starts another.
    """
    pool = _pools.get((size, device)) or _pools.setdefault((size, device), Pool(size, device))
    answers = pool.ask(pickle.dumps((function, args)), seconds)
    failed = {rank: answer for rank, answer in answers.items() if isinstance(answer, Failure)}
    if len(answers) < size or 0 < len(failed) < size:
        _pools.pop((size, device)).kill()
    if failed:
        raise min(failed.items())[1].error
    if len(answers) < size:
        missing = sorted(set(range(size)) - set(answers))
        raise TimeoutError(f"ranks {missing} of {size} were not done within {seconds:g} s")
    return [answers[rank] for rank in range(size)]


class Failure:
    """An exception of a rank; one that cannot be pickled becomes a RuntimeError of the same text."""

    def __init__(self, rank: int, error: BaseException):
        text = f"on rank {rank}:\n" + "".join(traceback.format_exception(error))
        error.add_note(text)
        try:
            pickle.loads(pickle.dumps(error))
            self.error = error
        except Exception:  # noqa: BLE001  # whatever its class does in pickling
            self.error = RuntimeError(text)


class Pool:
    """`size` processes that wait for work."""

    def __init__(self, size: int, device: Device):
        import torch.distributed as dist

        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        # kept by the parent, at a port that the system picks: none can be taken between finding and using it
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        pairs = [context.Pipe() for _ in range(size)]
        self.connections = [here for here, _ in pairs]
        self.processes = [
            context.Process(target=_work, args=(rank, size, device, self.store.port, there), daemon=True)
            for rank, (_, there) in enumerate(pairs)
        ]
        for process, (_, there) in zip(self.processes, pairs, strict=True):
            process.start()
            there.close()

    def ask(self, work: bytes, seconds: float) -> dict[int, Any]:
        """Each rank's answer, a Failure where it failed; without those that did not answer in time."""
        for connection in self.connections:
            connection.send_bytes(work)
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + seconds
        while len(answers) < len(self.connections) and (left := deadline - time.monotonic()) > 0:
            waiting = {connection: rank for rank, connection in enumerate(self.connections) if rank not in answers}
            for connection in wait(list(waiting), left):
                assert isinstance(connection, Connection)
                rank = waiting[connection]
                answers[rank] = _answer(rank, connection)
                if isinstance(answers[rank], Failure):  # the others may wait for it without end
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _answer(rank: int, connection: Connection) -> Any:
    try:
        return pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionError) as error:
        return Failure(rank, RuntimeError(f"rank {rank} ended without an answer ({type(error).__name__})"))


def _work(rank: int, size: int, device: Device, port: int, connection: Connection) -> None:
    """One rank's life.  The variables are those that torchrun sets."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else dict(each.split("=") for each in NO_MULTICAST)
    import torch

    from moebius.distributed.config import DistributedConfig
    from moebius.distributed.ranks import join

    torch.set_num_threads(1)
    ranks = join(DistributedConfig(ep_size=size, timeout_seconds=SECONDS), size, device_type=device)
    while True:
        try:
            work = connection.recv_bytes()
        except EOFError:  # the session is over
            return
        connection.send_bytes(_done(ranks, work))


def _done(ranks: Any, work: bytes) -> bytes:
    try:
        function, args = pickle.loads(work)
        return pickle.dumps(function(ranks, *args))
    except BaseException as error:  # noqa: BLE001  # SystemExit and pytest's outcomes too
        return pickle.dumps(Failure(ranks.rank, error))
