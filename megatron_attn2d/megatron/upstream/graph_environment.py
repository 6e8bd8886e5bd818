"""The environment variables under which CUDA graphs can hold messages of NCCL."""

from collections.abc import Mapping

_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Where torch reads the options of its allocator; the second name is the newer one."""
_EXPANDABLE = "expandable_segments:True"


def graph_fault(environ: Mapping[str, str]) -> tuple[str, str] | None:
    """Why CUDA graphs can't hold messages under these variables, and what to choose; None where they can.

    NCCL registers the buffers of a captured message with the network's card, which memory of expandable segments does
    not allow: ranks then wait for each other for ever, or read foreign memory.
    """
    allocator = next((name for name in _ALLOCATOR if _EXPANDABLE.lower() in environ.get(name, "").lower()), None)
    register = environ.get("NCCL_GRAPH_REGISTER")
    if allocator is None or register == "0":
        return None
    return (
        f"NCCL_GRAPH_REGISTER={'(not set)' if register is None else repr(register)}: NCCL would register the buffers "
        f"of messages in CUDA graphs, which {allocator}={environ[allocator]} does not allow",
        f"choose NCCL_GRAPH_REGISTER=0, or leave {_EXPANDABLE} out of {allocator}",
    )
