"""What the launched ranks of the tests do, and the program that launches them: `python -m tests.launch.targets ...`."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_attn2d.errors import UsageError
from megatron_attn2d.launch import ranks

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


def write_environment(args: Sequence[str]) -> None:
    """Writes this rank's variables to a file of its own in the directory args[0]."""
    Path(args[0], os.environ["RANK"]).write_text(" ".join(os.environ[name] for name in VARIABLES))


def write_start_method(args: Sequence[str]) -> None:
    """Writes how this rank starts processes of its own, data loaders' say, to the file args[0]."""
    Path(args[0]).write_text(multiprocessing.get_start_method())


def sleep(args: Sequence[str]) -> None:
    """Writes this rank's process id to the directory args[0] and sleeps."""
    Path(args[0], f"{os.environ['RANK']}.part").write_text(str(os.getpid()))
    Path(args[0], f"{os.environ['RANK']}.part").rename(Path(args[0], os.environ["RANK"]))
    time.sleep(60)


def raise_in_rank_1(args: Sequence[str]) -> None:
    """Raises in rank 1, and a moment later, for want of it, in rank 0; the others sleep."""
    rank = os.environ["RANK"]
    if rank == "1":
        raise KeyError("the cause")
    if rank == "0":
        time.sleep(0.1)
        raise ConnectionError("the consequence")
    sleep(args)


def misuse_in_rank_1(args: Sequence[str]) -> None:
    """Rank 1 finds a user's mistake, the others sleep."""
    if os.environ["RANK"] == "1":
        raise UsageError("one message")
    sleep(args)


def vanish_in_rank_1(args: Sequence[str]) -> None:
    """Rank 1 is killed by the system, say, for its memory; the others sleep."""
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    sleep(args)


def exit_in_rank_1(args: Sequence[str]) -> None:
    """Rank 1 exits with 7; the others sleep."""
    if os.environ["RANK"] == "1":
        sys.exit(7)
    sleep(args)


def save_on_sigterm(args: Sequence[str]) -> None:
    """Sleeps until SIGTERM, then takes a moment, as for saving, and leaves a file that says so."""
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    Path(args[0], os.environ["RANK"]).write_text(str(os.getpid()))
    while not received:
        time.sleep(0.01)
    time.sleep(0.5)
    Path(args[0], f"saved-{os.environ['RANK']}").touch()


if __name__ == "__main__":
    if sys.argv[1] != "pretrain":
        ranks.PRELOAD = ()
        sys.exit(ranks.run_local(int(sys.argv[2]), globals()[sys.argv[1]], sys.argv[3:]))
    from megatron_attn2d.training import pretrain_gpt

    sys.exit(ranks.run_local(int(sys.argv[2]), pretrain_gpt.main, sys.argv[3:]))
