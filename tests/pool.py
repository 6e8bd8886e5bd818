"""A pool of ranks that outlives a test: importing torch in eight processes costs a minute, forking them a second.

A fork server imports torch and Megatron once; the ranks are forked from it. `RankPool.run` forms a fresh world of
exactly the asked size for each call, so a test of three ranks and one of eight share the same processes.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from torch.distributed import TCPStore

PRELOAD = [
    "torch",
    "torch.distributed",
    "megatron.core",
    "megatron_attn2d.attention.attention2d",
    "megatron_attn2d.attention.ring",
    "tests.pool",
]

MOST_THREADS = 100
"""More in a rank, and all are replaced: what a training left of Gloo's groups spins once their peers have gone."""


class RankFailed(AssertionError):
    """A rank raised, died or did not answer in time; the message holds the first traceback."""


class RankPool:
    """Persistent processes that run `fn(rank, *args, **kwargs)` as the ranks of one world."""

    def __init__(self, method: str = "forkserver") -> None:
        self._context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload(PRELOAD)
        self._workers: list[tuple[Any, Connection]] = []
        self._tired = False
        # Where ranks meet that make their world themselves. They leave it when the next call begins: it outlives them.
        self._stores: deque[TCPStore] = deque(maxlen=2)

    def run(
        self,
        fn: Callable[..., Any],
        nranks: int,
        *args: Any,
        init_group: bool = True,
        timeout: float = 300.0,
        **kwargs: Any,
    ) -> list[Any]:
        """Return what each rank's `fn(rank, *args, **kwargs)` returned, in rank order.

        With `init_group` a Gloo world of `nranks` exists during the call; without it only the environment variables of
        a launcher are set. After a failure every rank is replaced: its peers may be stuck in a collective.
        """
        if self._tired:
            self.close()
        while len(self._workers) < nranks:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_worker, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        with tempfile.TemporaryDirectory() as rendezvous:
            # Kept by this process: a port that is merely free may be another's by the time that a rank listens on it.
            self._stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
            port = self._stores[-1].port
            store = os.path.join(rendezvous, "store") if init_group else None
            for _, connection in self._workers[nranks:]:
                connection.send(None)  # NCCL's groups are left by all of their ranks together
            for rank, (_, connection) in enumerate(self._workers[:nranks]):
                variables = self.variables(rank, nranks)
                connection.send((fn, rank, nranks, port, store, timeout, variables, args, kwargs))
            return self._collect(fn.__name__, nranks, timeout)

    def variables(self, rank: int, nranks: int) -> dict[str, str]:
        """Environment variables of a rank during a call, besides those of a launcher."""
        return {}

    def _collect(self, name: str, nranks: int, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._workers[:nranks])}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise RankFailed(
                    f"{name}: ranks {sorted(waiting.values())} of {nranks} gave no answer in {timeout:.0f} s"
                )
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    ok, value, threads = connection.recv()
                except (EOFError, ConnectionResetError):
                    ok, value, threads = False, "the process died", 0
                self._tired |= threads > MOST_THREADS
                if not ok:
                    self.close()
                    raise RankFailed(f"{name}: rank {rank} of {nranks} failed\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(nranks)]

    def close(self) -> None:
        """End all processes; the next `run` starts new ones."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers.clear()
        self._tired = False


def call(rank: int, target: Callable[[list[str]], Any], args: list[str]) -> None:
    """For `RankPool.run`: a target of `ranks.run_local`, which is not told its rank."""
    target(args)


def _worker(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what was imported is no garbage, and each training looks for some
    while True:
        try:
            call = connection.recv()
        except EOFError:
            return
        # Not right after the last call: the other ranks of that world may still have been connecting to this one.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if call is None:
            continue
        fn, rank, nranks, port, store, timeout, variables, args, kwargs = call
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(nranks),
            LOCAL_WORLD_SIZE=str(nranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",  # no rank is to serve the store
        )
        os.environ.update(variables)
        try:
            if store is not None:
                torch.distributed.init_process_group(
                    "gloo",
                    store=torch.distributed.FileStore(store, nranks),
                    rank=rank,
                    world_size=nranks,
                    timeout=timedelta(seconds=timeout),
                )
            answer = True, fn(rank, *args, **kwargs)
        except BaseException:
            answer = False, traceback.format_exc()
        try:
            connection.send((*answer, len(os.listdir("/proc/self/task"))))
        except BrokenPipeError:
            return
