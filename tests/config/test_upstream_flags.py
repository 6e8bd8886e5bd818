"""The table of Megatron's arguments, against its parser."""

import importlib.metadata
import importlib.util
from argparse import ArgumentParser

from megatron_attn2d.config import load_run, megatron_arguments, upstream_flags


def test_every_flag_is_one_of_megatrons(base):
    """A renamed argument of upstream's must not wait for a run to be found."""
    from megatron_attn2d.config.passed_through import owners
    from megatron_attn2d.training.own_arguments import add_own_arguments

    own = add_own_arguments(ArgumentParser())._option_string_actions
    known = {flag.removeprefix("--") for flag in (*upstream_flags.options(), *own)}
    assert {flag: key for flag, key in owners().items() if flag not in known} == {}


def test_the_table_of_upstreams_arguments_is_that_of_its_parser(monkeypatch):
    """After moving the pin: python -m megatron_attn2d.config.upstream_flags"""
    assert upstream_flags.options() == upstream_flags.described()
    upstream_flags.options.cache_clear()
    asked = []
    monkeypatch.setattr(upstream_flags, "described", lambda: asked.append(1) or {})
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19.999")
    assert upstream_flags.options() == {}, "another version's are read from its parser"
    upstream_flags.options.cache_clear()


def test_upstreams_parser_takes_what_we_compile(base):
    *tokens, run_dir_flag, _ = megatron_arguments(load_run(base, ["parallelism.virtual_pipeline=2"]))
    assert run_dir_flag == "--run-dir"
    args = upstream_flags.parser().parse_args(tokens)
    assert args.hierarchical_context_parallel_sizes == [2, 2]
    assert args.cp_comm_type == ["attention2d"]
    assert args.num_virtual_stages_per_pipeline_rank == 2
