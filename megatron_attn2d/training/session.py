"""One use of Megatron within a process: fixes, logs and arguments before it, and no global state after it."""

from __future__ import annotations

import gc
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TextIO
from unittest import mock

import torch

from megatron_attn2d.megatron.upstream import compat, cpu
from megatron_attn2d.training import derive
from megatron_attn2d.training.console import quiet
from megatron_attn2d.training.own_arguments import add_own_arguments


def run_in_megatron(body: Callable[[TextIO], None], megatron_args: Sequence[str]) -> None:
    """Run `body(console)` as this rank, inside `in_megatron`."""
    with in_megatron(megatron_args) as console:
        body(console)


@contextmanager
def in_megatron(megatron_args: Sequence[str]) -> Iterator[TextIO]:
    """While entered, Megatron works in this process, as one rank.

    `sys.argv` then holds `megatron_args` and the derived arguments. What this process prints goes to the log of the
    run in `--run-dir`.

    Yields:
        the console.

    Raises:
        ValueError: an argument contradicts what is installed or what this project supports.
    """
    rank = int(os.environ.get("RANK", "0"))
    run_dir = add_own_arguments(ArgumentParser(allow_abbrev=False)).parse_known_args(megatron_args)[0].run_dir
    with ExitStack() as stack:
        console = stack.enter_context(quiet(run_dir, rank))
        stack.enter_context(compat.applied_fixes())
        stack.enter_context(cpu.seam())
        # These import Megatron, which prints a greeting: the log must be open before.
        from megatron_attn2d.megatron import cuda_graphs
        from megatron_attn2d.training import upstream_refusals

        stack.callback(reset_megatron, owns_process_group=not torch.distributed.is_initialized())
        stack.callback(cuda_graphs.delete)  # also after an error: groups can't be destroyed before their graphs
        derive.set_environment(megatron_args)
        stack.enter_context(upstream_refusals.told(megatron_args))
        arguments = derive.with_derived_arguments(megatron_args)
        stack.enter_context(mock.patch.object(sys, "argv", ["pretrain_gpt", *arguments]))
        try:
            yield console
        except SystemExit as end:  # Megatron ends a run early by exit(0), for instance after a signal
            if end.code:
                raise
    cuda_graphs.forget()
    # The model's configuration and its groups refer to each other. Until Python collects that cycle, Gloo's threads
    # live on, and spin once the other ranks have gone. After an error nothing is collected: the destructor of a
    # checkpoint's half-written file ends the process.
    gc.collect()


def parsed() -> tuple[Namespace, Any]:
    """Megatron's arguments of the command line, and its configuration of the run with our attention in the model."""
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(extra_args_provider=add_own_arguments)
    return args, pretrain_cfg_container_from_args(args, _model(args))


def set_up_model() -> tuple[Namespace, list[torch.nn.Module]]:
    """Build the model within `in_megatron`.

    Returns:
        Megatron's arguments, and this rank's chunks of the model with the weights of their checkpoint.
    """
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training

    args, config = parsed()
    training.initialize_megatron()
    chunks, _, _ = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        checkpointing_context={},
        cfg_container=config,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return args, chunks


def _model(args: Namespace) -> Any:
    """Megatron's configuration of the model, with our attention."""
    from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args

    from megatron_attn2d.megatron.hybrid_spec import attention2d_hybrid_stack_spec
    from megatron_attn2d.megatron.layer_spec import attention2d_layer_spec

    if args.hybrid_layer_pattern is not None:
        model = hybrid_config_from_args(args)
        model.transformer.attention2d_head_groups = args.attention2d_head_groups
        model.hybrid_stack_spec = model.hybrid_stack_spec or attention2d_hybrid_stack_spec
    else:
        model = gpt_config_from_args(args)
        model.rope_scaling_factor = args.rope_scaling_factor  # upstream leaves it at 8
        if model.transformer_layer_spec is None:
            model.transformer_layer_spec = partial(attention2d_layer_spec, head_groups=args.attention2d_head_groups)
    return model


def reset_megatron(owns_process_group: bool) -> None:
    """Forget Megatron's global state of the run that ends, and destroy the process group if the run made it."""
    from megatron.core import parallel_state
    from megatron.training import global_vars
    from megatron.training.training import destroy_global_state

    if global_vars._GLOBAL_SIGNAL_HANDLER is not None:
        global_vars._GLOBAL_SIGNAL_HANDLER.release()
    destroy_global_state()
    parallel_state._HIERARCHICAL_CONTEXT_PARALLEL_GROUPS = None  # upstream's destroy_global_state leaves it
    if owns_process_group and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
