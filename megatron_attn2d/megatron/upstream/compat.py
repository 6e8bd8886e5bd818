"""What Megatron-Core from the wheel, without Apex and Transformer Engine, needs on any device, GPUs included.

`applied_fixes()` holds for as long as it is entered. What only CPU ranks need is in `cpu.py`.
"""

from __future__ import annotations

import copy
import functools
import importlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from megatron_attn2d.megatron.upstream.patching import Patch, applied


def _unless_compiled(compile_helpers: Any) -> Any:
    """`compile_helpers`, unless the index helpers came compiled, without the Makefile that would build them."""

    @functools.wraps(compile_helpers)
    def compile_if_possible() -> None:
        datasets = importlib.import_module("megatron.core.datasets")
        if not (Path(datasets.__path__[0]) / "Makefile").exists():
            importlib.import_module("megatron.core.datasets.helpers_cpp")  # an ImportError here is the honest answer
        else:
            compile_helpers()

    return compile_if_possible


def _refusing_no_tokens(get_num_epochs: Any) -> Any:
    """`GPTDataset._get_num_epochs` that refuses to make up the samples asked for from a set without tokens."""

    @functools.wraps(get_num_epochs)
    def count(self: Any, num_tokens_per_epoch: int) -> int:
        if num_tokens_per_epoch == 0:
            raise ValueError(
                f"the {self.index_split.name} split of {self.dataset_path} holds no document but has a weight in "
                f"--split {self.config.split}: give it 0, or more of the documents"
            )
        return get_num_epochs(self, num_tokens_per_epoch)

    return count


def _uses_torch_adam(optimizer: Any) -> bool:
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def _with_initialized_states(sharded_state_dict: Any) -> Any:
    """`DistributedOptimizer.sharded_state_dict` after giving torch's Adam the states that it is about to describe."""

    @functools.wraps(sharded_state_dict)
    def describe(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _uses_torch_adam(self.optimizer):
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    if not self.optimizer.state[parameter]:
                        self.optimizer.state[parameter] = {
                            "step": torch.tensor(0.0),
                            "exp_avg": torch.zeros_like(parameter),
                            "exp_avg_sq": torch.zeros_like(parameter),
                        }
        return sharded_state_dict(self, *args, **kwargs)

    return describe


def _with_own_steps(load_state_dict: Any) -> Any:
    """`DistributedOptimizer.load_state_dict`, after which each parameter of torch's Adam counts its own steps."""

    @functools.wraps(load_state_dict)
    def load(self: Any, state_dict: Any) -> None:
        load_state_dict(self, state_dict)
        if _uses_torch_adam(self.optimizer):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    return load


def _without_step(set_states: Any) -> Any:
    """`_set_main_param_and_optimizer_states` that keeps the step, restored before from the groups."""

    @functools.wraps(set_states)
    def set_all_but_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        set_states(self, model_param, {"step": None, **tensors})

    return set_all_but_step


def _within_padded_sequences(roll_packed: Any) -> Any:
    """`_roll_tensor_packed_seq` that finds each sequence where it lies: by the totals that count its padding."""

    @functools.wraps(roll_packed)
    def roll(tensor: Any, shifts: int, dims: int, packed_seq_params: Any, cp_group: Any = None) -> Any:
        padded = packed_seq_params.cu_seqlens_q_padded
        if padded is not None:
            packed_seq_params = copy.copy(packed_seq_params)
            packed_seq_params.cu_seqlens_q = padded
        return roll_packed(tensor, shifts, dims, packed_seq_params, cp_group)

    setattr(roll, ROLLS_WITHIN_PADDING, True)
    return roll


def mask_padding(packing: Any, padding: torch.Tensor) -> Any:
    """`packing`, whose MoE layers balance without the tokens where `padding` is true, [1, this rank's tokens]."""
    vars(packing)[_PADDING_MASK] = padding
    return packing


def _with_mask_of_pack(unflatten: Any) -> Any:
    """`_maybe_unflatten_for_moe`, which each layer calls before its experts, given the mask that the pack holds."""

    @functools.wraps(unflatten)
    def with_mask(self: Any, hidden_states: Any, padding_mask: Any, packed_seq_params: Any) -> Any:
        if self.is_moe_layer and padding_mask is None and packed_seq_params is not None:
            padding_mask = vars(packed_seq_params).get(_PADDING_MASK)
        return unflatten(self, hidden_states, padding_mask, packed_seq_params)

    return with_mask


def _counting_one_rank(count_tokens: Any) -> Any:
    """`get_tokens_per_expert_and_token_count` whose number of a rank's tokens, without padding, is the group's mean.

    That number weighs the rank's part of the loss: its own would weigh tokens less where there is more padding.
    """

    @functools.wraps(count_tokens)
    def count(routing_map: Any, reduce_group: Any, *args: Any, **kwargs: Any) -> Any:
        per_expert, of_rank, of_group = count_tokens(routing_map, reduce_group, *args, **kwargs)
        masked = kwargs.get("with_padding_mask", False)
        return per_expert, of_group / reduce_group.size() if masked else of_rank, of_group

    return count


def _divisible_by_ranks(set_cache: Any) -> Any:
    """`YarnRotaryEmbedding._set_cos_sin_cache` of as many positions more as the chunks of all context ranks take."""

    @functools.wraps(set_cache)
    def fill(self: Any, seq_len: int, *args: Any, **kwargs: Any) -> None:
        chunks = 1 if self.cp_group is None else 2 * self.cp_group.size()
        set_cache(self, -(-seq_len // chunks) * chunks, *args, **kwargs)

    return fill


def _norm_of_torch(norm: Any) -> Any:
    """Torch's norm where Transformer Engine's is not there to be built."""
    torch_norm = importlib.import_module("megatron_attn2d.megatron.upstream.torch_norm")
    return norm if torch_norm.HAVE_TE else torch_norm.SequenceParallelTorchNorm


def _of_any_module(get_layer_static_inputs: Any) -> Any:
    """The inputs of a graph without the dense mask that a layer adds to them."""
    return importlib.import_module("megatron.core.transformer.module").GraphableMegatronModule.get_layer_static_inputs


def _without_making_masks(get_replay_args: Any) -> Any:
    """`_get_te_cuda_graph_replay_args` that makes no mask where there is none."""

    @functools.wraps(get_replay_args)
    def arguments(self: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        given = {} if attention_mask is None else {"attention_mask": attention_mask}
        return get_replay_args(self, *args, **given, **kwargs)

    return arguments


ROLLS_WITHIN_PADDING = "rolls_within_padding"
"""Marks the function that shifts packed tokens for multi-token prediction once it minds padding."""
_PADDING_MASK = "_attention2d_padding_mask"
"""Name of what `mask_padding` adds to a pack."""
_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
_LAYER = "megatron.core.transformer.transformer_layer:TransformerLayer"
REFUSING_NO_TOKENS = Patch(
    "megatron.core.datasets.gpt_dataset:GPTDataset._get_num_epochs",
    _refusing_no_tokens,
    "a split with a weight but without documents would be counted through for ever",
)
FIXES = (
    Patch(
        "megatron.core.datasets.utils:compile_helpers",
        _unless_compiled,
        "the wheel ships the compiled helpers without the Makefile, and upstream exits when `make` fails",
    ),
    REFUSING_NO_TOKENS,
    Patch(
        f"{_OPTIMIZER}.sharded_state_dict",
        _with_initialized_states,
        "loading reads the step of every parameter from Adam's state, which torch's Adam fills in at its first step",
    ),
    Patch(
        f"{_OPTIMIZER}.load_state_dict",
        _with_own_steps,
        "it gives all parameters one shared step tensor, which torch's Adam then increments once per parameter: the "
        "bias correction would silently be wrong",
    ),
    Patch(
        f"{_OPTIMIZER}._set_main_param_and_optimizer_states",
        _without_step,
        "it looks up the step of torch's Adam among the loaded tensors, where it is not kept: KeyError 'step'",
    ),
    Patch(
        "megatron.core.transformer.multi_token_prediction:_roll_tensor_packed_seq",
        _within_padded_sequences,
        "it looks for packed sequences at the totals without their padding, and so mixes neighbours",
    ),
    Patch(
        "megatron.core.models.common.embeddings.yarn_rotary_pos_embedding:YarnRotaryEmbedding._set_cos_sin_cache",
        _divisible_by_ranks,
        "its first table has the positions of the original model, 4096 of them, which 3 context ranks can't share",
    ),
    Patch(
        f"{_LAYER}._maybe_unflatten_for_moe",
        _with_mask_of_pack,
        "the model's argument padding_mask is cut for sequence parallelism on the first stage of a GPT alone, is "
        "shifted for multi-token prediction, and does not reach it in a hybrid model",
    ),
    Patch(
        "megatron.core.transformer.moe.router:get_tokens_per_expert_and_token_count",
        _counting_one_rank,
        "told of padding, it counts a rank's tokens after it has summed those of all ranks in place, and so "
        "multiplies a load-balancing loss by their number",
    ),
    Patch(
        f"{_LAYER}.get_layer_static_inputs",
        _of_any_module,
        "each graph of Transformer Engine would hold a dense mask of tokens per rank x tokens, which nobody reads",
    ),
    Patch(
        f"{_LAYER}._get_te_cuda_graph_replay_args",
        _without_making_masks,
        "each replay of such a graph would write that mask anew",
    ),
    Patch(
        "megatron.core.models.hybrid.hybrid_block:TENorm",
        _norm_of_torch,
        "the last norm of a hybrid model is Transformer Engine's, whatever its spec says",
    ),
)


def applied_fixes() -> AbstractContextManager[None]:
    """Applies `FIXES` while entered."""
    return applied(FIXES)
