"""Ranks of this machine that pose as hosts of their own, also where they share GPUs: NCCL then talks over loopback."""

from __future__ import annotations


def posing(host: int, alone: bool = True) -> dict[str, str]:
    """The environment variables of a rank of this host; `alone`: no other rank belongs to it."""
    found = {
        "NCCL_HOSTID": f"node{host}",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_NET": "Socket",
        "NCCL_MNNVL_ENABLE": "0",
    }
    if alone:
        found |= {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
    return found
