"""Which of Megatron's arguments change a training, by measurement: two steps with and without, in each kind of model.

    python -m tests.megatron.argument_sweep                        all, and writes the table anew: about an hour
    python -m tests.megatron.argument_sweep use_rope_scaling ...   some, printed

scripts/argument_sweep.sh runs the first. The table is `megatron_attn2d/config/argument_effects.json`, by which
`megatron_attn2d/config/effects.py` refuses what would change nothing. Losses, norms of gradients and learning rates are
compared bit for bit, on one CPU rank in fp32.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from argparse import Action
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_attn2d.config import effects, upstream_flags
from megatron_attn2d.data import indexed
from megatron_attn2d.launch import ranks
from tests.megatron.runs import OPTIONS, arguments, metrics, train_rank

Options = dict[str, Any]

_MLA: Options = {
    "multi_latent_attention": True,
    "group_query_attention": None,
    "num_query_groups": None,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 16,
    "rotary_scaling_factor": 4.0,
}
_EXPERTS: Options = {"num_experts": 4, "moe_ffn_hidden_size": 64, "disable_bias_linear": True}
_HYBRID: Options = {"num_layers": None, "hybrid_layer_pattern": "*-*-"}
_YARN: Options = {"position_embedding_type": "yarn", "rotary_scaling_factor": 4.0}

BASES: dict[str, Options] = {
    "gpt rope": {},
    "gpt learned_absolute": {"position_embedding_type": "learned_absolute"},
    "gpt none": {"position_embedding_type": "none"},
    "gpt yarn": _YARN,
    "mla yarn": _MLA,
    "mla rope": {**_MLA, "rope_type": "rope"},
    "hybrid rope": _HYBRID,
    "hybrid learned_absolute": {**_HYBRID, "position_embedding_type": "learned_absolute"},
    "hybrid none": {**_HYBRID, "position_embedding_type": "none"},
    "hybrid yarn": {**_HYBRID, **_YARN},
    "hybrid mla yarn": {**_MLA, **_HYBRID, "hybrid_layer_pattern": "+-+-"},
    "hybrid mla rope": {**_MLA, **_HYBRID, "hybrid_layer_pattern": "+-+-", "rope_type": "rope"},
    "gpt moe": _EXPERTS,
    "gpt mtp": {"mtp_num_layers": 1, "untie_embeddings_and_output_weights": True},
    "hybrid moe": {**_HYBRID, **_EXPERTS, "hybrid_layer_pattern": "*E*E"},
    "hybrid mtp": {**_HYBRID, "hybrid_layer_pattern": "*-/*-", "untie_embeddings_and_output_weights": True},
}
"""The kinds of `effects.py`, and how a model of each differs from the base."""
FOREMOST = ("gpt rope", "mla yarn", "hybrid rope", "gpt moe", "gpt mtp", "hybrid moe")
"""The kinds in which every argument is tried; those about positions in all kinds, those of other programs in one."""
BASE: Options = {
    "num_layers": 2,
    "hidden_size": 32,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "global_batch_size": 2,
    "train_iters": 2,
    "null_tokenizer_eod_id": 32,  # blanks, so that there are ends of documents in every sample
    "split": "80,10,10",
    "eval_iters": 0,
    "no_attention_self_check": True,
}

OTHER_PROGRAMS = ("rl", "biencoder", "vision", "inference")
"""Groups of Megatron's arguments that its other programs read."""
GROUPS_LEFT_OUT = (
    *("profiling", "checkpointing", "distributed init", "logging", "autoresume", "straggler", "workload inspector"),
    *("one logger", "In-process restart", "ft_package", "rerun engine", "msc", "fault injector", "Transformer-Engine"),
    *("options", "validation", "learning rate and weight decay", "regularization"),
)
"""Groups of arguments about speed, memory, files, failures or what is reported, which rightly change no loss; and about
optimizers and schedules, which show only after many steps."""
LEFT_OUT = re.compile(
    r"tensor_.*|pipeline_.*|.*_parallel_.*|sequence_parallel|cp_comm_type|max_seqlen_per_dp_cp_rank|tp_comm_.*"
    r"|.*overlap.*|delay_wgrad.*|defer_embedding.*|wgrad_.*|use_ring_exchange_p2p|microbatch_group.*|.*offload.*"
    r"|recompute_.*|distribute_saved.*|checkpoint_activations|fp[48](_.*)?|first_last_layers_bf16|num_layers_at_.*"
    r"|.*kitchen.*|.*quantizer.*|.*cuda_graph.*|.*deepep.*|.*hybridep.*|.*ncclep.*|.*paged_stash.*|flex_.*|moe_flex.*"
    r"|moe_token_dispatcher.*|.*permute_fusion|.*fusion.*|.*fused.*|use_transformer_engine_op_fuser|.*grouped_gemm.*"
    r"|moe_single_grouped.*|moe_per_layer_logging|moe_router_padding.*|config_logger_dir|deterministic_mode"
    r"|transformer_impl|attention_backend|flash_attention_version|inference_.*|nccl_.*|symmetric_ar.*|flash_decode"
    r"|batch_invariant.*|high_priority.*|clone_scatter.*|.*te_activation.*|disable_bf16.*|use_flash_attn|use_mcore_models"
    r"|manual_gc.*|exit_.*|profile.*|nvtx.*|.*_interval|empty_unused.*|no_persist.*|persist.*|check_for.*|pin_cpu.*"
    r"|optimizer_cpu.*|use_torch_optimizer.*|dump_param.*|gradient_accumulation.*|masked_softmax.*|.*_gather"
    r"|loss_scale.*|initial_loss.*|min_loss.*|hysteresis|.*_in_fp32|.*_in_bf16|fp16.*|bf16|fp16_lm_cross_entropy|mlp_chunks.*"
    r"|.*dtype.*|num_workers|.*mmap.*|num_dataset_builder.*|.*cache_path|dataloader_.*|create_attention_mask.*"
    r"|init_model_with_meta_device|use_cpu_initialization|cpu_.*|te_rng_tracker|inference_rng_tracker|mock_data|mamba_.*"
    r"|disable_mamba.*|use_precision_aware.*|.*fsdp.*|enable_experimental|.*qk_clip.*|onnx_safe|yaml_cfg|spec|use_mp_args"
    r"|.*symmetric.*|result_rejected.*|logits_.*|fim_.*|per_.*path|.*_data_path|data_.*path|rampup.*|step_batch.*"
    r"|calculate_per_token_loss|cross_entropy.*|lr_decay_samples|lr_warmup_samples|lr_wsd_decay_samples|train_samples"
    r"|tokenizer.*|vocab_.*|merge_file|tiktoken.*|trust_remote.*|chat_template|padded_vocab_size|hetero.*|linear_.*"
    r"|group_query_attention|is_hybrid_model|.*layer_pattern|.*override_pattern|dsa_.*|experimental_attention_variant"
    r"|mtp_standalone|moe_enable_routing_replay|moe_router_force_.*|moe_expert_rank_capacity.*|sft.*|muon.*|lion.*|sgd_.*"
    r"|batch_size|warmup|model_parallel_size|encoder_.*|decoder_.*|global_batch_size|micro_batch_size|train_iters|data_args_path"
    r"|mup_.*|use_mup|cache_mla_latents|mla_down_proj.*|mtp_detach.*|.*tensorboard.*|num_layers|hidden_size|num_attention_heads"
    r"|override_opt.*|use_checkpoint_opt.*|decrease_batch.*|gpu_sniff.*|phase_transition.*|object_storage.*|freeze_all.*"
    r"|fp32_residual.*|add_qkv_bias|multi_latent_attention|apply_query_key_layer_scaling|use_mamba.*|moe_layer_recompute"
    r"|max_position_embeddings|seq_length|account_for_.*|perform_initialization|reuse_grad_buf.*|allow_ambiguous.*|use_mcore.*"
    r"|deprecated_.*|make_vocab.*|pad_vocab_size|mid_level.*|split|seed|num_experts|lr|optimizer|metadata_path|special_tokens"
    r"|.*glu_interleave_size|null_tokenizer.*|eval_.*|skip_train|position_embedding_type|use_rotary_position_embeddings|no_position_embedding|add_position_embedding|rope_type|activation_func_clamp.*"
)
"""Not tried, by their names: about speed and memory; only seen on GPUs, with more ranks, in half precision or with
libraries that aren't installed everywhere; decided by our own configuration; or refused by name anyway."""
POSITIONS = re.compile(r".*(rope|rotary|yarn|mscale|position).*")


SPELT = {"yarn_correction_range_round_to_int": "--no-yarn-correction-range-round-to-int"}
"""The flag to try, where the first one says what holds anyway."""


@dataclass(frozen=True)
class Trial:
    """An argument with a value that isn't its default, and what it must stand beside to mean anything."""

    value: Any
    needs: Options


NEEDS: dict[str, Options] = {
    "rope_scaling_factor": {"use_rope_scaling": True},
    "moe_router_bias_update_rate": {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"},
    "moe_router_enable_expert_bias": {"moe_router_score_function": "sigmoid"},
    "moe_router_quantile_balancing_ema": {"moe_router_load_balancing_type": "quantile"},
    "moe_router_group_topk": {"moe_router_num_groups": 2},
    "moe_router_num_groups": {"moe_router_group_topk": 1},
    "moe_token_drop_policy": {"moe_expert_capacity_factor": 0.5},
    "moe_pad_expert_input_to_capacity": {"moe_expert_capacity_factor": 0.5},
    "moe_shared_expert_gate": {"moe_shared_expert_intermediate_size": 32},
    "moe_upcycling_granularity": {"moe_use_upcycling": True},
    "glu_linear_offset": {"swiglu": True},
    "window_attn_skip_freq": {"window_size": "8,0"},
    "moe_apply_probs_on_input": {"moe_router_topk": 1},
    "moe_router_topk": {"moe_router_pre_softmax": True},
    "mtp_use_repeated_layer": {"mtp_num_layers": 2},
}
"""What else must be given for an argument to mean anything."""
VALUES: Options = {
    "window_size": "8,0",
    "window_attn_skip_freq": "[1,0,0,0]",  # also in a hybrid model, where every second layer attends
    "no_rope_freq": 1,  # in all layers: of 2, a hybrid model would have it in its MLPs
    "moe_layer_freq": 2,
    "moe_router_load_balancing_type": "sinkhorn",
    "moe_router_dtype": "fp64",
    "moe_router_score_function": "sigmoid",
    "moe_expert_capacity_factor": 0.5,
    "moe_router_topk": 1,
    "moe_router_num_groups": 2,
    "moe_router_group_topk": 1,
    "moe_token_drop_policy": "position",
    "moe_shared_expert_intermediate_size": 32,
    "moe_ffn_hidden_size": 32,
    "moe_latent_size": 16,
    "mtp_num_layers": 2,
    "ffn_hidden_size": 96,
    "kv_channels": 16,
    "rotary_percent": 0.5,
    "rotary_base": 500,
    "yarn_correction_range_round_to_int": True,
    "rotary_seq_len_interpolation_factor": 4,
    "rotary_scaling_factor": 8.0,
    "mscale": 0.5,
    "mscale_all_dim": 0.5,
    "yarn_original_max_position_embeddings": 16,
    "yarn_beta_fast": 4.0,
    "yarn_beta_slow": 0.5,
    "num_query_groups": 4,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "norm_epsilon": 1e-2,
    "iterations_to_skip": [2],
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 16,
    "v_head_dim": 8,
    "softmax_type": "learnable",
    "dataloader_type": "cyclic",
    "moe_z_loss_coeff": 0.01,
    "moe_aux_loss_coeff": 0.01,
    "moe_input_jitter_eps": 0.1,
    "sample_rate": 0.5,
    "moe_router_topk_scaling_factor": 2.0,
    "mrope_section": [1, 1, 2],
}
"""What is tried where no value follows from the argument's type."""


def tried() -> Iterator[tuple[Action, str]]:
    """The arguments to try, and the title of their group."""
    seen = set()
    for group in upstream_flags.parser()._action_groups:
        for action in group._group_actions:
            if (
                not action.option_strings
                or action.dest in seen
                or (action.nargs == 0 and action.const == action.default)
            ):
                continue
            seen.add(action.dest)
            if group.title in OTHER_PROGRAMS or not (group.title in GROUPS_LEFT_OUT or LEFT_OUT.fullmatch(action.dest)):
                yield action, str(group.title)


def trial(action: Action) -> Trial | None:
    """A value for an argument that isn't its default; None where none is known."""
    needs = NEEDS.get(action.dest, {})
    if action.dest in VALUES:
        return Trial(VALUES[action.dest], needs)
    if action.nargs == 0:
        return Trial(True, needs)
    if action.choices:
        return next((Trial(choice, needs) for choice in action.choices if choice != action.default), None)
    kind = getattr(action.type, "__name__", "str")
    if kind == "int":
        return Trial(2 * action.default if action.default else 2, needs)
    if kind == "float":
        return Trial(action.default / 2 if action.default else 0.5, needs)
    return Trial("x", needs) if action.nargs is None else None


class Sweep:
    """Trains in forked processes, and remembers what each base gave."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._found: dict[str, Any] = {}
        ranks._preload()
        importlib.import_module("megatron.core.tokenizers.text")
        gc.collect()
        gc.freeze()  # what was imported is no garbage, and each training looks for some
        self._text = indexed.build(indexed.standard_library_sources()[:20], scratch / "text")

    def steps(self, options: Options) -> list[Any] | str:
        """What was recorded of the steps of a training, or why there was none."""
        key = json.dumps(options, sort_keys=True)
        if key not in self._found:
            self._found[key] = self._trained(options)
        return self._found[key]

    def state(self, kind: str, flag: str, given: Trial) -> tuple[str, str]:
        """How an argument does in a kind of model, and a remark."""
        name = flag.removeprefix("--")
        base = BASES[kind]
        plain = self.steps(base)
        assert not isinstance(plain, str), f"{kind}: {plain}"
        alone = self.steps({**base, name: given.value})
        if isinstance(alone, list) and alone != plain:
            return "changes", ""
        if given.needs:
            without, together = (
                self.steps({**base, **given.needs}),
                self.steps({**base, **given.needs, name: given.value}),
            )
            if isinstance(together, str):
                return "refused", together
            if together != (plain if isinstance(without, str) else without):
                return ("needs", "") if isinstance(alone, list) else ("refused", alone)
        return ("refused", alone) if isinstance(alone, str) else ("nothing", "")

    def _trained(self, options: Options) -> list[Any] | str:
        run = Path(tempfile.mkdtemp(dir=self._scratch))
        said = run / "said"
        child = os.fork()
        if child == 0:
            self._train(run, said, options)
        deadline = time.monotonic() + 120
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
            time.sleep(0.01)
        try:
            if said.exists():
                return said.read_text()
            if not (run / "metrics.jsonl").exists():
                return "ended without a step"
            return [(step["loss"], step["grad_norm"], step["lr"]) for step in metrics(run)]
        finally:
            shutil.rmtree(run)

    def _train(self, run: Path, said: Path, options: Options) -> None:
        quiet = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(quiet, descriptor)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        given = {**OPTIONS, **BASE, "run_dir": run, "data_path": self._text, **options}
        spelt = {key.replace("-", "_"): value for key, value in given.items()}  # flags replace options of their name
        torch.set_num_threads(1)
        try:
            with (
                mock.patch("megatron.training.arguments._print_args"),
                mock.patch.object(effects, "table", dict),  # which would refuse what is measured here
            ):
                train_rank(0, arguments(**spelt))
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            said.write_text(f"{type(error).__name__}: {error or last.line}")
        os._exit(0)


def measured(sweep: Sweep, names: set[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of the table, flag by flag."""
    for action, group in tried():
        if names is not None and action.dest not in names:
            continue
        given = trial(action)
        if given is None:
            continue
        flag = SPELT.get(action.dest, action.option_strings[0])
        if group in OTHER_PROGRAMS:
            kinds = FOREMOST[:1]
        else:
            kinds = tuple(BASES) if POSITIONS.fullmatch(action.dest) else FOREMOST
        states: dict[str, tuple[str, str]] = {}
        for kind in kinds:
            without_extra = effects.EXTRAS.get(kind)
            if without_extra is None or states[without_extra][0] != "changes":
                states[kind] = sweep.state(kind, flag, given)
        yield (
            flag,
            {
                "value": given.value,
                "needs": sorted(given.needs),
                "kinds": {kind: state for kind, (state, _) in states.items()},
                "said": {kind: said for kind, (_, said) in states.items() if said},
            },
        )


def write(rows: dict[str, dict[str, Any]]) -> None:
    """Writes the arguments that some kind of model ignores."""
    lines = []
    for flag, row in sorted(rows.items()):
        if {"nothing", "needs"} & set(row["kinds"].values()):
            kept = {name: row[name] for name in ("kinds", "needs") if row[name]}
            lines.append(f"    {json.dumps(flag)}: {json.dumps(kept)}")
    path = Path(effects.__file__).with_name(effects.TABLE)
    version = json.dumps(upstream_flags.installed())
    path.write_text(f'{{\n  "megatron-core": {version},\n  "flags": {{\n' + ",\n".join(lines) + "\n  }\n}\n")


def main(names: list[str]) -> None:
    began, rows = time.monotonic(), {}
    with tempfile.TemporaryDirectory(prefix="argument-sweep-") as scratch:
        for flag, row in measured(Sweep(Path(scratch)), set(names) or None):
            rows[flag] = row
            print(f"{time.monotonic() - began:5.0f} s  {flag}", json.dumps(row), flush=True)
    if not names:
        write(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
