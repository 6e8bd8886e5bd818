"""What this package takes from Megatron-Core, read from its own sources, and what of it the installed version lacks."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron_attn2d

PACKAGE = Path(megatron_attn2d.__file__).parent

WRAPPED = {
    "megatron.training.training:train": ["forward_step_func", "model"],
    "megatron.training.training:train_step": ["forward_step_func", "data_iterator", "model"],
    "megatron.training.training:training_log": [
        *("loss_dict", "total_loss_dict", "learning_rate", "iteration", "loss_scale", "report_memory_flag"),
        *("skipped_iter", "grad_norm"),
    ],
    "megatron.training.training:save_checkpoint_and_time": ["iteration"],
    "megatron.training.checkpointing:save_checkpoint": ["iteration"],
    "megatron.training.checkpointing:load_checkpoint": ["ddp_model", "optimizer", "opt_param_scheduler", "load_arg"],
    "megatron.training.training:build_pretraining_data_loader": ["dataset", "consumed_samples"],
    "megatron.core.datasets.gpt_dataset:GPTDataset._get_num_epochs": ["self", "num_tokens_per_epoch"],
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict": ["self", "state_dict"],
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states": [
        *("self", "model_param", "tensors"),
    ],
    "megatron.core.transformer.multi_token_prediction:MultiTokenPredictionBlock.__init__": ["self", "config", "spec"],
    "megatron.core.transformer.multi_token_prediction:_roll_tensor_packed_seq": [
        *("tensor", "shifts", "dims", "packed_seq_params", "cp_group"),
    ],
    "megatron.core.models.common.embeddings.yarn_rotary_pos_embedding:YarnRotaryEmbedding._set_cos_sin_cache": [
        *("self", "seq_len"),
    ],
    "megatron.core.transformer.transformer_layer:TransformerLayer.get_layer_static_inputs": [
        *("self", "seq_length", "micro_batch_size"),
    ],
    "megatron.core.transformer.module:GraphableMegatronModule.get_layer_static_inputs": [
        *("self", "seq_length", "micro_batch_size"),
    ],
    "megatron.core.tensor_parallel:checkpoint": ["function", "distribute_saved_activations"],
    "megatron.core.tensor_parallel.random:_set_cuda_rng_state": ["new_state", "device", "graph_safe"],
}
"""The parameters with which upstream's functions begin that are replaced or wrapped by ones of the same parameters."""


@dataclass(frozen=True)
class Use:
    """A name of upstream's in one of our sources, and how it is called there, if it is."""

    module: str
    name: str
    place: str
    positional: int | None = None
    keywords: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """What of it the installed version lacks."""
        try:
            target: Any = importlib.import_module(self.module)
            for part in self.name.split("."):
                target = getattr(target, part)
        except (ImportError, AttributeError) as error:
            return f"{self.module}.{self.name}, used in {self.place}, is gone: {error}"
        if self.positional is None or not isinstance(target, Callable):  # type: ignore[arg-type]
            return None
        try:
            inspect.signature(target).bind(*[None] * self.positional, **dict.fromkeys(self.keywords))
        except TypeError as error:
            return f"{self.module}.{self.name} is no longer called as in {self.place}: {error}"
        except ValueError:  # it has no signature
            pass
        return None


def uses(package: Path = PACKAGE) -> Iterator[Use]:
    """Every name of `megatron.*` that the package imports, and every call of one whose arguments can be read."""
    for path in sorted(package.rglob("*.py")):
        yield from _uses(ast.parse(path.read_text()), str(path.relative_to(package)))


def _uses(tree: ast.AST, file: str) -> Iterator[Use]:
    imported: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron":
            for alias in node.names:
                imported[alias.asname or alias.name] = str(node.module), alias.name
                yield Use(str(node.module), alias.name, f"{file}:{node.lineno}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
            module, name = imported[node.value.id]
            if inspect.ismodule(_found(module, name)):
                yield Use(f"{module}.{name}", node.attr, f"{file}:{node.lineno}")
        if isinstance(node, ast.Call) and (use := _called(node, imported, file)):
            yield use


def _called(call: ast.Call, imported: dict[str, tuple[str, str]], file: str) -> Use | None:
    if any(isinstance(argument, ast.Starred) for argument in call.args) or any(k.arg is None for k in call.keywords):
        return None
    arguments = {"positional": len(call.args), "keywords": tuple(str(keyword.arg) for keyword in call.keywords)}
    place = f"{file}:{call.lineno}"
    match call.func:
        case ast.Name(id=name) if name in imported:
            return Use(*imported[name], place, **arguments)  # type: ignore[arg-type]
        case ast.Attribute(value=ast.Name(id=owner), attr=name) if owner in imported:
            module, parent = imported[owner]
            if inspect.ismodule(_found(module, parent)):
                return Use(f"{module}.{parent}", name, place, **arguments)  # type: ignore[arg-type]
    return None


def _found(module: str, name: str) -> Any:
    try:
        loaded = importlib.import_module(module)
        return getattr(loaded, name, None) or importlib.import_module(f"{module}.{name}")
    except ImportError:
        return None


def moved(package: Path = PACKAGE) -> list[str]:
    """Everything that the installed version of Megatron-Core lacks of what the package uses, a line each."""
    lines = [line for use in uses(package) if (line := use.missing())]
    for target, expected in WRAPPED.items():
        module, _, name = target.partition(":")
        if line := Use(module, name, "a wrapper").missing():
            lines.append(line)
            continue
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        found = list(inspect.signature(function).parameters)[: len(expected)]
        if found != expected:
            lines.append(f"{target} begins with the parameters {found}, where our wrapper expects {expected}")
    return sorted(set(lines))


if __name__ == "__main__":  # PYTHONPATH=another/version python -m tests.megatron.upstream.sources
    print(*moved() or ["nothing moved"], sep="\n")
