"""The sweep over Megatron's arguments speaks of arguments that there are; its table is of those that it tries."""

from __future__ import annotations

from megatron_attn2d.config import effects, upstream_flags
from tests.megatron import argument_sweep as sweep


def test_the_sweep_knows_megatrons_arguments() -> None:
    dests = {option.dest for option in upstream_flags.options().values()}
    spelt = {flag.removeprefix("--").replace("-", "_") for flag in upstream_flags.options()}
    known = dests | spelt
    for options in (*sweep.BASES.values(), *sweep.NEEDS.values(), sweep.VALUES):
        assert options.keys() <= known
    assert effects.EXTRAS.keys() | set(effects.EXTRAS.values()) | set(sweep.FOREMOST) <= sweep.BASES.keys()


def test_the_table_is_of_what_the_sweep_tries() -> None:
    flags = {sweep.SPELT.get(action.dest, action.option_strings[0]) for action, _ in sweep.tried()}
    assert effects.table(), "the installed Megatron-Core is another than that of the sweep"
    assert effects.table().keys() <= flags
    for effect in effects.table().values():
        assert effect.kinds.keys() <= sweep.BASES.keys()
        assert {"nothing", "needs"} & set(effect.kinds.values())
