"""A cluster on one machine: hosts are network namespaces, each with a rate-limited card on one switch.

Real TCP crosses real (virtual) cards, whose kernel counters tell what was moved. Needs root, iproute2 and `tc`. Nothing
outside the namespaces is touched but the limits of the neighbour table, which are put back; everything is removed when
the `with` block ends, whichever way.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

CARD = "eth0"
HEADERS = 14 + 20 + 32
"""Bytes of a packet before its payload: Ethernet, IPv4, TCP with time stamps."""
_LIMITS = {"gc_thresh1": 8192, "gc_thresh2": 16384, "gc_thresh3": 32768}
_IPV4 = Path("/proc/sys/net/ipv4")
_NEIGHBOURS = _IPV4 / "neigh/default"
_MTU = 4000  # about InfiniBand's largest packet
# A card sends in the order of arrival and drops nothing. Where sockets may queue megabytes, an acknowledgement waits
# for seconds behind them, as on no real network: TCP then repeats what is merely late, and of many senders to one host
# a few take most of its card. So every connection has a small window, and nothing is repeated before 20 s have passed.
_TCP = {
    "tcp_rmem": "4096 16384 16384",
    "tcp_wmem": "4096 65536 131072",
    "tcp_limit_output_bytes": "8192",
    "tcp_rto_min_us": "20000000",
    "tcp_early_retrans": "0",
}


class EmulatedCluster:
    """`hosts` hosts whose cards carry `rate` (as `tc` writes it: 50mbit) in each direction."""

    def __init__(self, hosts: int, rate: str) -> None:
        if os.geteuid() != 0:
            raise PermissionError("an emulated cluster makes network namespaces: run as root")
        missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
        if missing:
            raise FileNotFoundError(f"{' and '.join(missing)} not found: install iproute2")
        self.hosts, self.rate = hosts, rate
        self._prefix = f"attn2d-{os.getpid()}"
        self._limits: dict[str, str] = {}
        self._terminate: Any = None

    def namespace(self, host: int) -> str:
        """Name of a host's network namespace."""
        return f"{self._prefix}-{host}"

    def __enter__(self) -> EmulatedCluster:
        # A full mesh of hosts overflows the default neighbour table: "No route to host".
        self._limits = {name: (_NEIGHBOURS / name).read_text() for name in _LIMITS}
        self._terminate = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # clean up then too
        try:
            for name, value in _LIMITS.items():
                (_NEIGHBOURS / name).write_text(str(value))
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _build(self) -> None:
        switch = f"{self._prefix}-switch"
        _ip(f"netns add {switch}", *(f"netns add {self.namespace(i)}" for i in range(self.hosts)))
        _ip("link add bridge type bridge", "link set bridge up", namespace=switch)
        # The bucket's queue is deep: a card delays, it does not drop.
        shape = f"root tbf rate {self.rate} burst 64kb limit 256mb"
        for host in range(self.hosts):
            _ip(
                f"link add port{host} mtu {_MTU} type veth peer name {CARD} mtu {_MTU} netns {self.namespace(host)}",
                f"link set port{host} master bridge up",
                namespace=switch,
            )
            _ip(
                "link set lo up",
                f"addr add 10.77.{host // 250}.{host % 250 + 1}/16 dev {CARD}",
                f"link set {CARD} up",
                namespace=self.namespace(host),
            )
        for host in range(self.hosts):
            _run("tc", "-n", self.namespace(host), "qdisc", "add", "dev", CARD, *shape.split())
            _run("tc", "-n", switch, "qdisc", "add", "dev", f"port{host}", *shape.split())

    def _remove(self) -> None:
        names = [f"{self._prefix}-switch", *(self.namespace(i) for i in range(self.hosts))]
        for name in names:
            if Path("/run/netns", name).exists():
                subprocess.run(["ip", "netns", "delete", name], check=False)
        for name, value in self._limits.items():
            (_NEIGHBOURS / name).write_text(value)
        signal.signal(signal.SIGTERM, self._terminate)

    def run(self, fn: Callable[..., Any], ranks_per_host: int, *args: Any, timeout: float = 600.0) -> list[Any]:
        """`fn(rank, *args)` on every rank, rank r on host r // ranks_per_host, in a Gloo world over the cards.

        Ranks are forked, so import what they need (torch) before the call and start no threads. The first failure, or
        `timeout` seconds, ends all of them.

        Raises:
            RuntimeError: a rank failed, with its traceback, or time ran out.
        """
        world = self.hosts * ranks_per_host
        processes: dict[Connection, int] = {}
        order: list[Connection] = []
        with tempfile.TemporaryDirectory() as folder:
            try:
                for rank in range(world):
                    ours, theirs = Pipe()
                    pid = os.fork()
                    if pid == 0:
                        ours.close()
                        _rank(rank, world, self.namespace(rank // ranks_per_host), f"{folder}/store", fn, args, theirs)
                    theirs.close()
                    processes[ours] = pid
                    order.append(ours)
                return _collect(order, timeout)
            finally:
                for pid in processes.values():
                    os.kill(pid, signal.SIGKILL)
                for pid in processes.values():
                    os.waitpid(pid, 0)


def card_received() -> tuple[int, int]:
    """Bytes, with all headers, and packets that the card of this process's host has received."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == CARD:
            received, packets = counters.split()[:2]
            return int(received), int(packets)
    raise RuntimeError(f"no {CARD} in this network namespace")


def _rank(
    rank: int, world: int, namespace: str, store: str, fn: Callable[..., Any], args: Sequence[Any], answer: Connection
) -> None:
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what the parent has set up is the parent's to remove
        with Path("/run/netns", namespace).open() as file:
            os.setns(file.fileno(), os.CLONE_NEWNET)
        for name, value in _TCP.items():
            (_IPV4 / name).write_text(value)
        os.environ["GLOO_SOCKET_IFNAME"] = CARD
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
        answer.send((True, fn(rank, *args)))
        answer.recv()  # until all are done: a closed connection would fail the others
    except BaseException:
        answer.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
    finally:
        os._exit(0)


def _collect(order: Sequence[Connection], timeout: float) -> list[Any]:
    results: dict[Any, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(order):
        ready = wait([c for c in order if c not in results], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RuntimeError(f"{len(order) - len(results)} of {len(order)} ranks gave no answer in {timeout:.0f} s")
        for connection in ready:
            assert isinstance(connection, Connection)
            ok, value = connection.recv()
            if not ok:
                raise RuntimeError(value)
            results[connection] = value
    return [results[connection] for connection in order]


def _ip(*commands: str, namespace: str | None = None) -> None:
    where = [] if namespace is None else ["-n", namespace]
    subprocess.run(["ip", *where, "-batch", "-"], input="\n".join(commands), text=True, check=True)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
