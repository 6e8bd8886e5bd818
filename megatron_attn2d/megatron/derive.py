"""Megatron arguments that follow from what is installed and from the device, so that nobody has to know them."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Installed:
    """What the derived arguments depend on."""

    cuda: bool
    transformer_engine: bool
    apex: bool

    @classmethod
    def here(cls) -> Installed:
        """As found on this host; a library counts where Megatron-Core could import it."""
        return cls(
            cuda=torch.cuda.is_available(),
            transformer_engine=_has_module("transformer_engine"),
            apex=_has_module("apex"),
        )


@dataclass(frozen=True)
class Derived:
    """One derived argument: a flag, its value if it takes one, and why."""

    flag: str
    reason: str
    value: str | None = None
    also_accepted: tuple[str, ...] = field(default=())
    """Values that a user may give instead."""


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def derived_arguments(arguments: Sequence[str], installed: Installed) -> list[Derived]:
    """The arguments to add to `arguments`.

    Raises:
        ValueError: `arguments` contradicts what is installed or what this project supports.
    """
    always = "attention2d masks by position; the loader would build a dense mask of sequence x sequence for nothing"
    wanted = [
        Derived("--no-create-attention-mask-in-dataloader", always),
        Derived("--calculate-per-token-loss", "weighs every token the same on any number of context ranks"),
    ]
    if not installed.transformer_engine:
        no_te = "Transformer Engine is not installed"
        wanted.append(Derived("--transformer-impl", no_te, "local"))
        if not installed.apex:
            no_te += ", nor is Apex"
            wanted.append(Derived("--no-persist-layer-norm", f"{no_te}: the norm is torch's"))
            wanted.append(Derived("--no-rope-fusion", f"{no_te}: its fused kernel is missing"))
            if "--use-distributed-optimizer" in arguments:
                reason = f"{no_te}: torch's Adam has no other format of its checkpoints that reshards"
                wanted.append(Derived("--dist-ckpt-optim-fully-reshardable", reason))
    if not _has_module("fused_weight_gradient_mlp_cuda"):
        reason = "Apex's extension fused_weight_gradient_mlp_cuda is not installed"
        wanted.append(Derived("--no-gradient-accumulation-fusion", reason))
    if not _has_module("scaled_masked_softmax_cuda"):
        wanted.append(Derived("--no-masked-softmax-fusion", "Megatron's fused softmax kernels are not installed"))
    if not installed.cuda:
        wanted.append(Derived("--distributed-backend", "no CUDA device: ranks run on the CPU", "gloo"))
        reason = "CPU ranks share the cores with their data loaders: they load in the training process"
        wanted.append(Derived("--num-workers", reason, "0", also_accepted=tuple(map(str, range(1, 65)))))

    given = dict(zip(arguments, [*arguments[1:], ""], strict=True))
    if given.get("--attention-backend") == "local":
        raise ValueError(
            "--attention-backend local: Megatron would silently replace context-parallel attention by its own, which "
            "sees this rank's tokens only; choose auto, flash, fused or unfused"
        )
    if "--mtp-num-layers" in given:
        raise ValueError("--mtp-num-layers: multi-token prediction is not supported yet; leave it out")
    for one in wanted:
        if one.flag in given and one.value is not None and given[one.flag] not in (one.value, *one.also_accepted):
            raise ValueError(f"{one.flag} {given[one.flag]}: {one.reason}; the only valid choice is {one.value}")
    return [one for one in wanted if one.flag not in given]


def with_derived_arguments(arguments: Sequence[str], installed: Installed | None = None) -> list[str]:
    """`arguments` and the derived ones, which rank 0 logs with their reasons.

    Raises:
        ValueError: `arguments` contradicts what is installed or what this project supports.
    """
    derived = derived_arguments(arguments, installed or Installed.here())
    if os.environ.get("RANK", "0") == "0":
        for one in derived:
            logger.info("derived %s%s: %s", one.flag, f" {one.value}" if one.value else "", one.reason)
    return [*arguments, *(token for one in derived for token in (one.flag, one.value) if token is not None)]
