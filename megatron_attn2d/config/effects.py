"""Finds arguments that would change nothing in a run's kind of model, so that they are refused rather than ignored.

`argument_effects.json` holds the arguments that a training with some kind of model ignores, and their state in each
kind. `scripts/argument_sweep.sh` measured it, by two training steps with and without each argument.

A model's kind is its layers and its positions, such as `gpt rope`. Experts and multi-token prediction are kinds beside
that: the kind `gpt moe` tells which arguments have an effect only with experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from megatron_attn2d.config import upstream_flags

TABLE = "argument_effects.json"

State = Literal["changes", "needs", "refused", "nothing"]
"""What an argument does. changes: it changes the training. needs: it does so only beside other arguments. refused:
Megatron refuses it, or it can't be tried. nothing: it changes nothing."""
_MOST_FIRST: tuple[State, ...] = ("changes", "needs", "refused", "nothing")
EXTRAS = {"gpt moe": "gpt rope", "gpt mtp": "gpt rope", "hybrid moe": "hybrid rope", "hybrid mtp": "hybrid rope"}
"""Kinds that add something to a model, and the kind of model that was measured with and without it."""
_MEASURED_ON = {"gpt": "gpt rope", "mla": "mla yarn", "hybrid": "hybrid rope"}
"""The kind in which arguments that do not concern positions were measured, by the kind's layers."""
_UNKNOWN = {
    *("spec", "heterogeneous_layers_config_path", "experimental_attention_variant", "use_checkpoint_args"),
    *("hybrid_override_pattern", "yaml_cfg"),
}
"""Arguments that make models without a kind here; a model with `mrope` has none either."""


@dataclass(frozen=True)
class Effect:
    """A row of the table."""

    kinds: dict[str, State]
    needs: tuple[str, ...] = ()
    """The arguments that it needs to change anything."""


@dataclass(frozen=True)
class Ignored:
    """An argument that would change nothing."""

    flag: str
    values: list[str]
    reason: str
    choice: str


@cache
def table() -> dict[str, Effect]:
    """The arguments that some kind of model ignores, by flag; empty under a version that wasn't measured."""
    found = json.loads(resources.files(__package__).joinpath(TABLE).read_text())
    if found["megatron-core"] != upstream_flags.installed():
        return {}
    return {flag: Effect(row["kinds"], tuple(row.get("needs", ()))) for flag, row in found["flags"].items()}


def ignored(arguments: Sequence[str]) -> Iterator[Ignored]:
    """The arguments of a command line for Megatron that would change nothing in its model."""
    given = upstream_flags.given(arguments)
    if not (kinds := _kinds(given)):
        return
    options = upstream_flags.options()
    for flag, effect in table().items():
        one = given.get(options[flag].dest)
        if one is None or one[0] != flag or one[1] == [str(options[flag].default)]:
            continue
        state = min((_state(effect, kind) for kind in kinds), key=_MOST_FIRST.index)
        missing = [name for name in effect.needs if name not in given]
        if state == "nothing":
            yield Ignored(flag, one[1], f"{flag} changes nothing {_described(kinds)}", "leave it out")
        elif state == "needs" and missing:
            needed = ", ".join(missing)
            yield Ignored(
                flag, one[1], f"{flag} changes nothing without {needed}", f"set {needed} too, or leave it out"
            )


def _kinds(given: dict[str, tuple[str, list[str]]]) -> list[str]:
    """The kinds of the model that these arguments make; empty where they don't tell."""
    if _UNKNOWN & given.keys():
        return []

    def value(dest: str, default: str) -> str:
        return " ".join(given[dest][1]) if dest in given else default

    positions = (
        "rope" if "use_rotary_position_embeddings" in given else value("position_embedding_type", "learned_absolute")
    )
    if positions == "mrope":
        return []
    pattern = value("hybrid_layer_pattern", "")
    latent = "multi_latent_attention" in given
    prefix = "hybrid" if pattern else "gpt"
    kinds = []
    if latent and (not pattern or "+" in pattern):
        kinds.append(f"{'hybrid mla' if pattern else 'mla'} {value('rope_type', 'yarn')}")
    if not latent or "*" in pattern or positions == "learned_absolute":  # latent attention adds them to its own
        kinds.append(f"{prefix} {positions}")
    if "E" in pattern or (not pattern and "num_experts" in given):
        kinds.append(f"{prefix} moe")
    if "/" in pattern or (not pattern and "mtp_num_layers" in given):
        kinds.append(f"{prefix} mtp")
    return kinds


def _state(effect: Effect, kind: str) -> State:
    """The state of an argument in a kind of model: measured there, or in the kind that stands for its layers."""
    if kind in effect.kinds:
        return effect.kinds[kind]
    if kind in EXTRAS:
        return effect.kinds.get(kind.replace("hybrid", "gpt"), "nothing")  # only where it makes a difference
    layers, _, positions = kind.rpartition(" ")
    if layers == "hybrid mla":
        return min((_state(effect, f"{like} {positions}") for like in ("mla", "hybrid")), key=_MOST_FIRST.index)
    return effect.kinds.get(_MEASURED_ON[layers], effect.kinds["gpt rope"])


def _described(kinds: Sequence[str]) -> str:
    """'in a GPT whose position_embedding_type is rope'"""
    names = {"gpt": "GPT", "hybrid": "hybrid model", "mla": "GPT with latent attention", "hybrid mla": "hybrid model"}
    layers, _, positions = kinds[0].rpartition(" ")
    latent = " and latent attention" if layers == "hybrid mla" else ""
    where = "rope_type" if "mla" in layers else "position_embedding_type"
    return f"in a {names[layers]}{latent} whose {where} is {positions}"
