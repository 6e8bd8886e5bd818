import contextlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from argparse import ArgumentParser
from operator import attrgetter
from pathlib import Path
from unittest import mock

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_attn2d import config
from megatron_attn2d.config import ConfigError, keys, load_run, megatron_arguments, resolved_yaml, upstream_flags
from megatron_attn2d.config.arguments import embedded_data, left_out
from megatron_attn2d.config.continued import check_continued
from megatron_attn2d.config.files import check_files
from megatron_attn2d.config.yaml_io import dump, parse
from megatron_attn2d.run.checkpoints import begin_save, keep_configuration

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs" / "runs").glob("*.yaml"))

# 8 CPU ranks: 2 pipeline stages x 4 context ranks.
BASE = """
model: {num_layers: 4, hidden_size: 128, num_attention_heads: 4}
parallelism: {pipeline: 2}
context_parallel: {size: 4}
data: {vocab_size: 512, null_tokenizer_eod_id: 256}
optimizer: {lr: 1e-3}
training: {train_iters: 60, seq_length: 256, global_batch_size: 4, precision: fp32}
environment: {device: cpu}
"""
ROPE = "model.position_embedding_type=rope"
FULL = "training.recompute_granularity=full training.recompute_method=uniform training.recompute_num_layers=1"


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return path


def arguments(path, *overrides):
    return " ".join(megatron_arguments(load_run(path, overrides))) + " "


# --- what is refused: overrides of BASE -> the message, whole lines unless it ends with an ellipsis ---

REFUSED = {
    # names
    "num_layers=4": "num_layers: unknown key; did you mean model.num_layers?",
    "modle.num_layers=4": "modle: unknown key; did you mean model?",
    "model.num_layer=4": "model.num_layer: unknown key; did you mean num_layers?",
    "model.seq_length=8": "model.seq_length: unknown key; did you mean training.seq_length?",
    "parallelism.context=8": "parallelism.context: unknown key; known: data, expert, pipeline, sequence_parallel, ...",
    "context_parallel.zzz=8": "context_parallel.zzz: unknown key; known: grid, head_groups, layer_modes, ...",
    # types
    "model.num_layers='4'": "model.num_layers = '4': not an integer; write 8, without quotes or a decimal point",
    "model.num_layers=4.0": "model.num_layers = 4.0: not an integer; ...",
    "model.num_layers=true": "model.num_layers = true: not an integer; ...",
    "model.num_layers=null": "model.num_layers = null: not an integer; ...",
    "model.num_layers=[4]": "model.num_layers = [4]: not an integer; ...",
    "model.num_layers=1_000": "model.num_layers = '1_000': not an integer; ...",
    "model.num_layers=0": "model.num_layers = 0: must be greater than 0",
    "training.train_iters=-1": "training.train_iters = -1: must be greater than 0",
    "model.swiglu=yes": "model.swiglu = 'yes': not a boolean; write true or false",
    "model.swiglu=1": "model.swiglu = 1: not a boolean; write true or false",
    "optimizer.lr='1e-4'": "optimizer.lr = '1e-4': not a number; write 0.1 or 1e-4, without quotes",
    "optimizer.lr=.inf": "optimizer.lr = inf: must be a finite number",
    "optimizer.lr=.nan": "optimizer.lr = nan: must be a finite number",
    "optimizer.lr=0": "optimizer.lr = 0: must be greater than 0",
    "optimizer.adam_beta2=1": "optimizer.adam_beta2 = 1: must be less than 1",
    "model.normalization=rmsnorm": "model.normalization = 'rmsnorm': no such choice; choose LayerNorm or RMSNorm",
    "training.precision=fp8": "training.precision = 'fp8': no such choice; choose fp32, bf16 or fp16",
    "context_parallel.mode=p2p": (
        "context_parallel.mode = 'p2p': no such choice; choose attention2d, ring, all_gather or ulysses"
    ),
    "context_parallel.mode=attention2d:2x1": (
        "context_parallel.mode = 'attention2d:2x1': a grid has a key of its own; "
        "write mode: attention2d and grid: [2, 1]"
    ),
    "context_parallel.grid=2x2": (
        "context_parallel.grid = '2x2': not a grid; write auto, [rows, columns] or [heads, rows, columns]"
    ),
    "context_parallel.grid=[4]": (
        "context_parallel.grid = [4]: not a grid; write auto, [rows, columns] or [heads, rows, columns]"
    ),
    "context_parallel.grid=[2, true]": (
        "context_parallel.grid = [2, True]: not a grid; write auto, [rows, columns] or [heads, rows, columns]"
    ),
    "context_parallel.grid=[-2, -2]": (
        "context_parallel.grid = [-2, -2]: not a grid; write auto, [rows, columns] or [heads, rows, columns]"
    ),
    "data.paths=corpus": (
        "data.paths = 'corpus': not a list of prefixes, nor a blend; write [prefix, ...] or {prefix: weight, ...}"
    ),
    "data.split=98 1 1": "data.split = '98 1 1': not three weights; write 98,1,1",
    "data.split='9.8.7,1,1'": "data.split = '9.8.7,1,1': not three numbers; write 98,1,1",
    "run.name=../x": (
        "run.name = '../x': holds characters that a name or path must not; use letters, digits and . _ + -"
    ),
    "run.name=$(id)": "run.name = '$(id)': holds characters that a name or path must not; ...",
    "run.dir=--save": "run.dir = '--save': holds characters that a name or path must not; ...",
    "environment.variables={A: [1]}": (
        "environment.variables = {'A': [1]}: not environment variables; write {NAME: \"value\", ...}"
    ),
    'environment.variables={A: "a\\0b"}': "environment.variables = {'A': 'a\\x00b'}: not environment variables; ...",
    "model=4": "model = 4: not a section; write its keys below model:",
    'environment.variables={RANK: "3"}': (
        "environment.variables = {'RANK': '3'}: RANK is the launcher's, different in each rank; leave out RANK"
    ),
    # sizes of the model
    "model.hidden_size=130": (
        "model.hidden_size = 130: not a multiple of model.num_attention_heads = 4; choose 132, or set model.kv_channels"
    ),
    "model.position_embedding_type=rope model.kv_channels=33": (
        "model.position_embedding_type = 'rope': RoPE rotates pairs, and a head has 33 numbers to rotate; "
        "choose an even model.kv_channels, or hidden_size / num_attention_heads"
    ),
    # positions beyond the length that a model was trained at
    f"{ROPE} model.rope_scaling=linear": (
        "model.rope_scaling_factor = null: model.rope_scaling = linear divides by it; "
        "choose training.seq_length over the length trained at"
    ),
    f"{ROPE} model.rope_scaling=linear model.rope_scaling_factor=2.5": (
        "model.rope_scaling_factor = 2.5: Megatron divides positions by whole numbers; choose 2"
    ),
    f"{ROPE} model.rope_scaling=yarn model.rope_scaling_factor=4": (
        "model.rope_original_length = null: model.rope_scaling = yarn tells high frequencies from low ones by it; "
        "choose the length that the model was trained at"
    ),
    f"{ROPE} model.rope_scaling=llama3 model.rope_scaling_factor=8 model.rope_original_length=4096": (
        "model.rope_original_length = 4096: Megatron's rule of Llama 3.1 takes 8192; choose 8192, or yarn"
    ),
    f"{ROPE} model.rope_scaling=ntk model.rope_scaling_factor=8 megatron_args.use_rope_scaling=true": (
        "megatron_args.use_rope_scaling = true: model.rope_scaling = ntk decides about it; leave it out"
    ),
    f"{ROPE} model.rope_scaling=llama3 model.rope_scaling_factor=8 model.kind=hybrid": (
        "model.rope_scaling = 'llama3': Megatron's hybrid models (model.kind) scale positions evenly or not at all; ..."
    ),
    "model.rope_scaling=linear model.rope_scaling_factor=2": (
        "model.rope_scaling = 'linear': model.position_embedding_type is learned_absolute; ..."
    ),
    "model.rope_scaling_factor=2": "model.rope_scaling_factor = 2.0: model.rope_scaling is none; choose null, ...",
    # what long sequences need
    "training.offload_activations=true": (
        "training.offload_activations = true: it is about what full recomputation keeps; "
        "choose false, or training.recompute_granularity=full"
    ),
    f"{FULL} training.offload_activations=true megatron_args.distribute_saved_activations=true parallelism.tensor=2": (
        "training.offload_activations = true: megatron_args.distribute_saved_activations spreads what is kept ..."
    ),
    "training.loss_chunk_tokens=8 model.kind=hybrid": (
        "training.loss_chunk_tokens = 8: Megatron's hybrid models (model.kind) compute all logits at once; ..."
    ),
    "training.loss_chunk_tokens=8 megatron_args.mtp_num_layers=1": (
        "training.loss_chunk_tokens = 8: megatron_args.mtp_num_layers asks for another output layer or loss; ..."
    ),
    "optimizer.grad_reduce_in_bf16=true": "optimizer.grad_reduce_in_bf16 = true: training.precision is fp32; ...",
    "model.num_query_groups=8": (
        "model.num_query_groups = 8: does not divide model.num_attention_heads = 4; choose one of 1, 2, 4"
    ),
    "model.num_query_groups=3": (
        "model.num_query_groups = 3: does not divide model.num_attention_heads = 4; choose one of 1, 2, 4"
    ),
    "model.max_position_embeddings=128": (
        "model.max_position_embeddings = 128: less than training.seq_length = 256; choose 256 or more"
    ),
    # parallelism
    "parallelism.tensor=3": (
        "parallelism.tensor = 3: does not divide model.num_attention_heads = 4; choose one of 1, 2, 4"
    ),
    "model.num_attention_heads=12 model.hidden_size=144 model.num_query_groups=6 parallelism.tensor=4": (
        "parallelism.tensor = 4: neither divides model.num_query_groups = 6 nor is a multiple of it; "
        "choose one of 1, 2, 3, 6"
    ),
    "parallelism.pipeline=3": (
        "parallelism.pipeline = 3: 3 stages do not share model.num_layers = 4 evenly; stages in all: one of 1, 2, 4"
    ),
    "parallelism.virtual_pipeline=4": (
        "parallelism.virtual_pipeline = 4: 8 stages do not share model.num_layers = 4 evenly; "
        "stages in all: one of 1, 2, 4"
    ),
    "parallelism.pipeline=1 parallelism.virtual_pipeline=2": (
        "parallelism.virtual_pipeline = 2: needs parallelism.pipeline > 1, which is 1; choose null"
    ),
    "parallelism.virtual_pipeline=2 training.micro_batch_size=4": (
        "training.global_batch_size = 4: 1 micro-batches per replica, the interleaved schedule needs "
        "parallelism.pipeline = 2; choose 8"
    ),
    "parallelism.sequence_parallel=true": (
        "parallelism.sequence_parallel = true: needs parallelism.tensor > 1, which is 1; choose false"
    ),
    "parallelism.sequence_parallel=true parallelism.tensor=4 training.seq_length=24": (
        "parallelism.sequence_parallel = true: 6 tokens per context rank do not split over parallelism.tensor = 4; ..."
    ),
    "parallelism.expert=2": (
        "parallelism.expert = 2: the model has no experts; choose 1, or set megatron_args.num_experts"
    ),
    "parallelism.expert=3 megatron_args.num_experts=3": (
        "parallelism.expert = 3: does not divide tensor * context * data = 4 ranks; choose one of 1, 2, 4"
    ),
    # context parallelism
    "training.seq_length=252": (
        "training.seq_length = 252: not a multiple of 2 * context_parallel.size = 8, the chunks of the zigzag; "
        "choose 248 or 256"
    ),
    "context_parallel.grid=[2, 3]": (
        "context_parallel.grid = [2, 3]: 6 ranks, but context_parallel.size is 4; "
        "choose auto or one of [4, 1], [2, 2], [1, 4]"
    ),
    "context_parallel.mode=ring context_parallel.grid=[2, 2]": (
        "context_parallel.grid = [2, 2]: context_parallel.mode = ring has no grid; choose auto"
    ),
    "context_parallel.mode=ulysses model.num_attention_heads=6 model.hidden_size=48": (
        "context_parallel.size = 4: 6 query and 6 key/value heads per tensor rank do not spread over 4 ranks; "
        "spread them over one of 1, 2, 3, 6"
    ),
    "context_parallel.grid=[2, 2] context_parallel.tile=[2, 4]": (
        "context_parallel.tile = [2, 4]: does not fill the grid of 2 rows x 2 columns; "
        "rows: one of 1, 2; columns: one of 1, 2"
    ),
    "context_parallel.layer_modes=[attention2d, ring]": (
        "context_parallel.layer_modes = ['attention2d', 'ring']: names 2 layers, but model.num_layers is 4; name ..."
    ),
    "context_parallel.layer_modes=[ring, ring, ring, ulysses]": (
        "context_parallel.mode = 'attention2d': is the mode of no layer in context_parallel.layer_modes; choose one ..."
    ),
    "context_parallel.mode=ring context_parallel.layer_modes=[ring, attention2d, ring, ring]": (
        "context_parallel.mode = 'ring': context_parallel.layer_modes has attention2d; choose attention2d"
    ),
    "context_parallel.layer_modes=[attention2d,ulysses,ring,ring] model.num_attention_heads=6 model.hidden_size=48": (
        "context_parallel.size = 4: 6 query and 6 key/value heads per tensor rank do not spread over 4 ranks; ..."
    ),
    "context_parallel.mode=ring context_parallel.tile=[1, 1]": (
        "context_parallel.tile = [1, 1]: context_parallel.mode = ring has no grid; choose null"
    ),
    "context_parallel.head_groups=3": (
        "context_parallel.head_groups = 3: does not divide the 4 key/value heads of a tensor rank; "
        "choose auto or one of 1, 2, 4"
    ),
    "context_parallel.grid=[4,1,1] model.num_attention_heads=12 model.num_query_groups=3 model.hidden_size=96": (
        "context_parallel.grid = [4, 1, 1]: 12 query and 3 key/value heads per tensor rank do not spread over 4 ranks; "
        "spread them over one of 1, 3"
    ),
    # world
    "environment.gpus_per_node=8": "environment.gpus_per_node = 8: environment.device = cpu has no GPUs; choose null",
    "environment.nodes=2": "environment.nodes = 2: CPU ranks run on one machine; choose 1",
    "environment.device=cuda environment.nodes=2": (
        "environment.nodes = 2: environment.gpus_per_node is not given; set that too, or leave out both"
    ),
    "environment.device=cuda environment.gpus_per_node=6": (
        "world size = 6: not a multiple of tensor * pipeline * context = 1 * 2 * 4 = 8 ranks; "
        "choose 8 ranks, or other sizes"
    ),
    "environment.device=cuda environment.gpus_per_node=8 parallelism.data=2": (
        "parallelism.data = 2: with 8 ranks per replica that is 16 ranks, but there are 8; "
        "choose 1, or null to derive it"
    ),
    # batch
    "parallelism.data=3": (
        "training.global_batch_size = 4: not a multiple of training.micro_batch_size * replicas = 1 * 3; choose 6"
    ),
    "training.recompute_granularity=full": (
        "training.recompute_method = null: training.recompute_granularity is full; "
        "choose uniform or block with full, null otherwise"
    ),
    "training.recompute_granularity=selective training.recompute_num_layers=1": (
        "training.recompute_num_layers = 1: training.recompute_method is null; choose null"
    ),
    "training.recompute_granularity=full training.recompute_method=uniform": (
        "training.recompute_num_layers = null: training.recompute_method is uniform; "
        "choose 1, or more for fewer, larger pieces"
    ),
    "training.precision=fp16": (
        "training.precision = 'fp16': environment.device = cpu computes in fp32 or bf16; choose fp32"
    ),
    # data
    "data.split='0,1,1'": "data.split = '0,1,1': nothing is left for training; write 98,1,1",
    "training.eval_iters=2": (
        "training.eval_iters = 2: data.split = 1,0,0 leaves nothing for validation; choose 0, or data.split=98,2,0"
    ),
    "data.mock=true data.paths=[corpus]": "data.mock = true: data.paths are given too; choose one of the two",
    "data.vocab_size=50257": (
        "data.paths = []: the embedded data set is bytes, the tokenizer is not; name .bin/.idx prefixes, "
        "or set data.mock=true, or extend models/gpt_tiny_bytes.yaml"
    ),
    "data.paths=[.]": "data.paths = ['.']: a folder, whose files need a name to begin with; write ./NAME",
    "data.paths={slash/: 1}": "data.paths = {'slash/': 1.0}: a folder, whose files need a name ...",
    "data.paths={a: 1, b: 0}": (
        "data.paths = {'a': 1.0, 'b': 0.0}: a weight of a blend is not positive; leave out what has weight 0"
    ),
    "data.paths=[corpus] data.tokenizer_model=tokenizer": (
        "data.tokenizer_model = 'tokenizer': data.tokenizer_type = NullTokenizer takes ids as they are, and reads no "
        "file; choose null, or name data.tokenizer_type too"
    ),
    "data.paths=[corpus] data.vocab_size=null": (
        "data.vocab_size = null: NullTokenizer does not know the size of the vocabulary; choose 512 for bytes"
    ),
    "data.paths=[corpus] data.vocab_size=256": (
        "data.null_tokenizer_eod_id = 256: outside data.vocab_size = 256; choose 256 for bytes"
    ),
    "data.paths=[corpus] data.tokenizer_type=HuggingFaceTokenizer": (
        "data.tokenizer_model = null: HuggingFaceTokenizer is read from local files; name its file or folder"
    ),
    # documents
    "data.document_multiple=8": (
        "data.document_multiple = 8: data.document_masking is false; choose null, or document_masking=true"
    ),
    "data.document_masking=true data.document_multiple=12": (
        "data.document_multiple = 12: not a multiple of 2 * context_parallel.size = 8, the chunks of a document; "
        "choose 16, or null"
    ),
    "data.document_masking=true data.document_multiple=24": (
        "training.seq_length = 256: not a multiple of data.document_multiple = 24, where documents begin; choose 264"
    ),
    "data.format=sft data.mock=true": (
        "data.format = 'sft': made-up data (data.mock) holds no examples; choose text, or data.mock=false"
    ),
    "data.format=sft": (
        "training.seq_length = 256: an example of the embedded data set has up to 512 tokens, and is not cut; choose "
        "512 or more, or name data.paths"
    ),
    "megatron_args.sft=true": "megatron_args.sft = true: data.format decides about --sft; set data.format",
    "data.document_masking=true training.micro_batch_size=2": (
        "training.micro_batch_size = 2: documents of several samples go through as one sequence, for which pipeline "
        "stages are not prepared; choose 1, and a longer training.seq_length"
    ),
    "data.document_masking=true megatron_args.reset_position_ids=true": (
        "megatron_args.reset_position_ids = true: data.document_masking begins positions anew in each document "
        "already; leave it out"
    ),
    "data.document_masking=true megatron_args.hybrid_layer_pattern='*M'": (
        "megatron_args.hybrid_layer_pattern = '*M': layers M would carry what they know from a document into the next, "
        "under data.document_masking; choose * or +"
    ),
    "data.document_masking=true megatron_args.linear_attention_freq=2": (
        "megatron_args.linear_attention_freq = 2: its layers would carry what they know from a document into the next, "
        "under data.document_masking; leave it out, or data.document_masking=false"
    ),
    "megatron_args.dataloader_inter_document_masking=true": (
        "megatron_args.dataloader_inter_document_masking = true: data.document_masking decides about ..."
    ),
    "megatron_args.reset_attention_mask=true": (
        "megatron_args.reset_attention_mask = true: --reset-attention-mask makes a mask of all tokens, which no "
        "attention over context ranks reads; choose data.document_masking, or packed sequences (cu_seqlens), which "
        "do what it is for"
    ),
    # optimizer and checkpoint
    "optimizer.lr_decay_style=WSD": (
        "optimizer.lr_decay_style = 'WSD': WSD decays over its last steps; set megatron_args.lr_wsd_decay_iters too"
    ),
    "optimizer.min_lr=0.1": "optimizer.min_lr = 0.1: more than optimizer.lr = 0.001; choose 0.001 or less",
    "optimizer.lr_warmup_iters=60": (
        "optimizer.lr_warmup_iters = 60: the learning rate decays over 60 steps; choose less than 60"
    ),
    "optimizer.overlap_param_gather=true": (
        "optimizer.overlap_param_gather = true: needs use_distributed_optimizer and overlap_grad_reduce; "
        "choose false, or set both to true"
    ),
    "checkpoint.save=false checkpoint.save_interval=5": (
        "checkpoint.save_interval = 5: checkpoint.save is false; choose null"
    ),
    "checkpoint.save=false checkpoint.keep_last=2": (
        "checkpoint.keep_last = 2: checkpoint.save is false; leave it out"
    ),
    "checkpoint.keep_last=0": "checkpoint.keep_last = 0: must be greater than 0",
    "checkpoint.load=a checkpoint.start_from=b": (
        "checkpoint.start_from = 'b': checkpoint.load is given too; start_from takes the weights alone; keep one"
    ),
    "checkpoint.load=a megatron_args.finetune=true": (
        "megatron_args.finetune = true: checkpoint.start_from decides about --finetune; set checkpoint.start_from"
    ),
    "megatron_args.pretrained_checkpoint=a": (
        "megatron_args.pretrained_checkpoint = 'a': checkpoint.start_from decides about --pretrained-checkpoint; ..."
    ),
    "megatron_args.no_load_optim=true": (
        "megatron_args.no_load_optim = true: is about a start from checkpoint.load or checkpoint.start_from, which are "
        "null; leave it out"
    ),
    "checkpoint.start_from=a megatron_args.no_load_rng=true": (
        "megatron_args.no_load_rng = true: checkpoint.start_from takes the weights alone; leave it out"
    ),
    "megatron_args.ckpt_step=4": (
        "megatron_args.ckpt_step = 4: is about a start from checkpoint.load or checkpoint.start_from, which are null; "
        "leave it out, and to go back in a run write the step into its "
        "checkpoints/latest_checkpointed_iteration.txt"
    ),
    "megatron_args.override_opt_param_scheduler=true": (
        "megatron_args.override_opt_param_scheduler = true: checkpoint.may_change decides about ..."
    ),
    "megatron_args.use_checkpoint_args=true": (
        "megatron_args.use_checkpoint_args = true: --use-checkpoint-args takes the model from the checkpoint, ..."
    ),
    "megatron_args.exit_on_missing_checkpoint=true": "megatron_args.exit_on_missing_checkpoint = true: ...",
    "megatron_args.ckpt_format=torch": (
        "checkpoint.verify_integrity = true: only checkpoints of the format torch_dist carry checksums, not torch; "
        "choose false, or leave megatron_args.ckpt_format out"
    ),
    "megatron_args.non_persistent_save_interval=2": (
        "megatron_args.non_persistent_save_interval = 2: Megatron saves those by a "
        "megatron_args.non_persistent_ckpt_type, which is null; set that to global, or leave both out"
    ),
    "checkpoint.may_change=[data.path]": "checkpoint.may_change = ['data.path']: data.path is no key; ...",
    "checkpoint.may_change=[model.num_layers]": (
        "checkpoint.may_change = ['model.num_layers']: weights or states depend on model.num_layers; leave it out"
    ),
    "megatron_args.async_save=true": (
        "megatron_args.async_save = true: checkpoint.async_save decides about --async-save; set checkpoint.async_save"
    ),
    # overrides themselves
    "model.num_layers": "model.num_layers: not an override; write key.sub=value",
    "=4": "=4: not an override; write key.sub=value",
    "model..x=4": "model..x=4: not an override; write key.sub=value",
    "extends=other.yaml": "extends=other.yaml: extends belongs in a file; name the file there",
    "model.num_layers.x=1": (
        "model.num_layers.x=1: model.num_layers is a value, not a section; write model.num_layers=..."
    ),
    "data.paths=[a] data.paths.b=1": "data.paths.b=1: data.paths is a value, not a section; write data.paths=...",
    "data.paths=[a] data.paths+={b: 1}": (
        "data.paths+ = {'b': 1}: data.paths is a list so far; add the same kind, or replace it: data.paths"
    ),
    "model.num_layers+=[4]": "model.num_layers+ = [4]: model.num_layers is 4 so far; add the same kind, or ...",
    "model.num_layers+=4": (
        "model.num_layers+ = 4: not a list or a table, which alone can be added to; write model.num_layers"
    ),
    "data={paths: [a], paths+: [b]}": "data.paths = ['a']: is given with + and without; keep one",
    "model+={num_layers: 4}": "model+: unknown key; did you mean model?",
    "run={name:": "override 'run={name:', line 1, column 7: not valid YAML: ...",
    # Megatron's arguments
    "megatron_args.lr=0.1": "megatron_args.lr = 0.1: optimizer.lr decides about --lr; set optimizer.lr",
    "megatron_args.tensor-model-parallel-size=2": (
        "megatron_args.tensor_model_parallel_size = 2: parallelism.tensor decides about "
        "--tensor-model-parallel-size; set parallelism.tensor"
    ),
    "megatron_args.cp_comm_type=[p2p]": (
        "megatron_args.cp_comm_type = ['p2p']: context_parallel.mode decides about --cp-comm-type; "
        "set context_parallel.mode"
    ),
    "megatron_args.bf16=true": (
        "megatron_args.bf16 = true: training.precision decides about --bf16; set training.precision"
    ),
    "megatron_args.attention_backend=local": (
        "megatron_args.attention_backend = 'local': --attention-backend makes Megatron replace context-parallel "
        "attention by its own, which sees the tokens of one rank only; choose auto, flash, fused or unfused"
    ),
    "megatron_args.hybrid_context_parallel=true": (
        "megatron_args.hybrid_context_parallel = true: --hybrid-context-parallel changes the context-parallel group "
        "with every batch, and a grid is laid once; leave it out"
    ),
    "megatron_args.moe_router_topk=[1, 2]": (
        "megatron_args.moe_router_topk = [1, 2]: --moe-router-topk takes one value; write that alone"
    ),
    "megatron_args.window_size=[512, 0, 1]": (
        "megatron_args.window_size = [512, 0, 1]: not how many tokens before and after it a token sees; "
        "write [left, right], the right one -1 for all"
    ),
    "megatron_args.window_size=wide": "megatron_args.window_size = 'wide': not how many tokens before and after it ...",
    "megatron_args.window_size=[-1, 0]": "megatron_args.window_size = [-1, 0]: not how many tokens before and ...",
    "megatron_args={num-experts: 4, num_experts: 8}": (
        "megatron_args.num_experts = 8: is given with hyphens and with underscores; keep one"
    ),
    "megatron_args.qk-clip=true": (
        "megatron_args.qk_clip = true: --qk-clip needs the largest score, which our attention does not report yet; "
        "leave it out"
    ),
    "megatron_args.rampup_batch_size=[2, 2, 4]": (
        "megatron_args.rampup_batch_size = [2, 2, 4]: --rampup-batch-size is read by nobody in Megatron-Core 0.19; ..."
    ),
    "megatron_args.step_batch_size_schedule='0:2 4:4'": (
        "megatron_args.step_batch_size_schedule = '0:2 4:4': --step-batch-size-schedule excludes training.global_b..."
    ),
    "megatron_args.train_samples=100": "megatron_args.train_samples = 100: --train-samples excludes training.train_...",
    "megatron_args={fim_data: true, fim_rate: 0.5}": (
        "megatron_args.fim_data = true: --fim-data would be ignored: it is for data sets or losses other than ours; ..."
    ),
    "megatron_args.full_validation=true": "megatron_args.full_validation = true: --full-validation would be ignored...",
    "optimizer.optimizer=sgd checkpoint.save=true": (
        "optimizer.optimizer = 'sgd': Megatron can't load a saved state of SGD, so that the run could not be ..."
    ),
    "optimizer.optimizer=sgd optimizer.use_distributed_optimizer=true checkpoint.save=false": (
        "optimizer.use_distributed_optimizer = true: Megatron shards the state of Adam alone; choose false, or adam"
    ),
    "megatron_args.hybrid_layer_pattern='*-D-'": (
        "megatron_args.hybrid_layer_pattern = '*-D-': D, sparse attention, chooses its keys from the whole sequence, "
        "which no rank has; choose * or +"
    ),
    "megatron_args.yaml_cfg=x.yaml": (
        "megatron_args.yaml_cfg = 'x.yaml': --yaml-cfg discards all other arguments; leave it out"
    ),
    "megatron_args={window_size: [8, 0], window_attn_skip_freq: [1, 0, 1]}": (
        "megatron_args.window_attn_skip_freq = [1, 0, 1]: says it of 3 layers, model.num_layers is 4; name each"
    ),
    "megatron_args={window_size: [8, 0], window_attn_skip_freq: [1, 0, 2, 1]}": (
        "megatron_args.window_attn_skip_freq = [1, 0, 2, 1]: --window-attn-skip-freq takes 0 or 1 for each layer; ..."
    ),
    "megatron_args.num_experts=1": (
        "megatron_args.num_experts = 1: a token goes to megatron_args.moe_router_topk = 2 of them; choose 2 or ..."
    ),
    "megatron_args={hybrid_layer_pattern: '*-+E', multi_latent_attention: true, num_experts: 4}": (
        "megatron_args.hybrid_layer_pattern = '*-+E': Megatron has attention (*) or latent attention (+); choose one"
    ),
    "megatron_args.hybrid_layer_pattern='*E'": (
        "megatron_args.hybrid_layer_pattern = '*E': E is a layer of experts; set megatron_args.num_experts too"
    ),
    "model.kind=hybrid megatron_args.pipeline_model_parallel_layout='E(t|)*4L' training.micro_batch_size=2": (
        "megatron_args.pipeline_model_parallel_layout = 'E(t|)*4L': the stages of model.kind = hybrid stand in its "
        "pattern; write stages as | in megatron_args.hybrid_layer_pattern"
    ),
    "model.kind=hybrid megatron_args={num_experts: 4, moe_layer_freq: '[1,0]*2'}": (
        "megatron_args.moe_layer_freq = '[1,0]*2': is text, which is not read here; write a number, or [1, 0, ...]"
    ),
    "model.kind=hybrid megatron_args={window_size: [8, 0], window_attn_skip_freq: '[1,0]*2'}": (
        "megatron_args.window_attn_skip_freq = '[1,0]*2': is text, which is not read here; write a number, or ..."
    ),
    "model.kind=hybrid megatron_args.hybrid_layer_pattern=MM": (
        "megatron_args.hybrid_layer_pattern = 'MM': has 0 layers of attention (* or +), model.num_layers is 4; "
        "write them into it"
    ),
    "model.kind=hybrid megatron_args.mtp_num_layers=-1": (
        "megatron_args.mtp_num_layers = -1: not a number of layers; choose 1 or more, or leave it out"
    ),
    "model.kind=hybrid megatron_args.linear_attention_freq=2": (
        "megatron_args.linear_attention_freq = 2: is not read of a hybrid model; write those layers as G in ..."
    ),
    "context_parallel.mode=ring context_parallel.grid=auto context_parallel.tile=[3,1]": (
        "context_parallel.tile = [3, 1]: context_parallel.mode = ring has no grid; choose null"
    ),
    "model.kind=hybrid megatron_args={num_experts: 4, moe_layer_freq: 0}": (
        "megatron_args.moe_layer_freq = 0: means every layer of that many; choose 1 or more, or leave it out"
    ),
    "model.kind=hybrid megatron_args.hybrid_layer_pattern='M*-|M*-'": (
        "megatron_args.hybrid_layer_pattern = 'M*-|M*-': has 2 layers of attention (* or +), model.num_layers is 4; "
        "choose model.num_layers=2, or another pattern"
    ),
    "model.kind=hybrid megatron_args={hybrid_layer_pattern: 'M*M*|-*M*M', window_size: [8, 0], "
    "window_attn_skip_freq: [0, 1]}": (
        "megatron_args.window_attn_skip_freq = [0, 1]: says it of 2 layers, model.num_layers is 4; name each"
    ),
    "model.kind=hybrid megatron_args.hybrid_layer_pattern='*|*|*|*'": (
        "megatron_args.hybrid_layer_pattern = '*|*|*|*': has 4 stages, parallelism.pipeline x virtual_pipeline are 2; "
        "write 1 | into it"
    ),
    "megatron_args.pipeline_model_parallel_layout='E(t|)*4L' training.micro_batch_size=4": (
        "training.global_batch_size = 4: 1 micro-batches per replica, the interleaved schedule needs "
        "parallelism.pipeline = 2; choose 8"
    ),
    "megatron_args.num_layers_per_virtual_pipeline_stage=1 training.micro_batch_size=4": (
        "training.global_batch_size = 4: 1 micro-batches per replica, the interleaved schedule needs ..."
    ),
    # arguments that were measured to change nothing
    "megatron_args.reset_position_ids=true model.position_embedding_type=rope": (
        "megatron_args.reset_position_ids = true: --reset-position-ids changes nothing in a GPT whose "
        "position_embedding_type is rope; leave it out"
    ),
    "megatron_args.use_rope_scaling=true": "megatron_args.use_rope_scaling = true: --use-rope-scaling changes ...",
    "model.rotary_base=500000": (
        "model.rotary_base = 500000: --rotary-base changes nothing in a GPT whose position_embedding_type is "
        "learned_absolute; leave it out"
    ),
    "megatron_args={multi_latent_attention: true, yarn_original_max_position_embeddings: 8192}": (
        "megatron_args.yarn_original_max_position_embeddings = 8192: --yarn-original-max-position-embeddings changes "
        "nothing in a GPT with latent attention whose rope_type is yarn; leave it out"
    ),
    "megatron_args={hybrid_layer_pattern: '*-*-', use_rope_scaling: true} model.position_embedding_type=rope": (
        "megatron_args.use_rope_scaling = true: --use-rope-scaling changes nothing in a hybrid model whose ..."
    ),
    "megatron_args.hybrid_layer_pattern='*-*-' model.qk_layernorm=true": (
        "model.qk_layernorm = true: --qk-layernorm changes nothing in a hybrid model whose ..."
    ),
    "megatron_args.rope_scaling_factor=16 model.position_embedding_type=rope": (
        "megatron_args.rope_scaling_factor = 16: --rope-scaling-factor changes nothing without use_rope_scaling; "
        "set use_rope_scaling too, or leave it out"
    ),
    "megatron_args.moe_z_loss_coeff=0.001": "megatron_args.moe_z_loss_coeff = 0.001: --moe-z-loss-coeff changes ...",
    "megatron_args.grpo_iterations=4": "megatron_args.grpo_iterations = 4: --grpo-iterations changes nothing in ...",
    "megatron_args={'': 1}": "megatron_args.: no argument of Megatron; none of ...",
    "megatron_args.log_progres=true": "megatron_args.log_progres: no argument of Megatron; did you mean log_progress?",
    "megatron_args.apply_rope_fusion=false": (
        "megatron_args.apply_rope_fusion: no argument of Megatron; Megatron writes it --no-rope-fusion"
    ),
    "megatron_args.log_progress=1": (
        "megatron_args.log_progress = 1: --log-progress takes no value; write true, or false to leave it out"
    ),
    "megatron_args.ddp_bucket_size=many": (
        "megatron_args.ddp_bucket_size = 'many': Megatron refuses it: argument --ddp-bucket-size: invalid int ..."
    ),
    "megatron_args.weight_decay_incr_style=up": (
        "megatron_args.weight_decay_incr_style = 'up': Megatron refuses it: argument --weight-decay-incr-style: ..."
    ),
    "megatron_args.tokenizer_special_tokens=[--bf16]": (
        "megatron_args.tokenizer_special_tokens = ['--bf16']: --bf16 would be read as another argument; ..."
    ),
    "megatron_args.ddp_bucket_size=true": (
        "megatron_args.ddp_bucket_size = true: --ddp-bucket-size takes a value; "
        "write a number, a string or a list of them"
    ),
    # CUDA graphs and FP8
    "training.cuda_graphs=layer": (
        "training.cuda_graphs = 'layer': environment.device = cpu has no CUDA graphs; choose none"
    ),
    "environment.device=cuda megatron_args.cuda_graph_impl=full_iteration": (
        "training.cuda_graphs = 'none': megatron_args.cuda_graph_impl is full_iteration; choose iteration"
    ),
    "megatron_args.external_cuda_graph=true": (
        "megatron_args.external_cuda_graph = true: training.cuda_graphs decides about --external-cuda-graph; ..."
    ),
    "environment.device=cuda training.cuda_graphs=layer environment.variables="
    "{NCCL_GRAPH_REGISTER: 1, PYTORCH_CUDA_ALLOC_CONF: 'expandable_segments:True'}": (
        "environment.variables = {'NCCL_GRAPH_REGISTER': 1, 'PYTORCH_CUDA_ALLOC_CONF': 'expandable_segments:Tr...: "
        "NCCL_GRAPH_REGISTER='1': NCCL would register the buffers of messages in CUDA graphs, which "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True does not allow; choose NCCL_GRAPH_REGISTER=0, or leave "
        "expandable_segments:True out of PYTORCH_CUDA_ALLOC_CONF"
    ),
    "environment.device=cuda training.cuda_graphs=layer logging.attention_communication=true": (
        "logging.attention_communication = true: it measures by the CPU's calls, of which ..."
    ),
    "environment.device=cuda training.cuda_graphs=attention": (
        "training.precision = 'fp32': Megatron captures training.cuda_graphs = attention in bf16; choose bf16, or "
        "training.cuda_graphs=layer"
    ),
    "environment.device=cuda training.cuda_graphs=iteration data.document_masking=true": (
        "training.cuda_graphs = 'iteration': a graph is for one set of lengths, and data.document_masking brings "
        "others with each batch; choose none"
    ),
    "environment.device=cuda training.precision=bf16 training.cuda_graphs=attention training.check_finite=true": (
        "training.check_finite = true: it waits for the GPU in each layer, which training.cuda_graphs = attention ..."
    ),
    "environment.device=cuda training.cuda_graphs=iteration training.precision=fp16": (
        "training.precision = 'fp16': the scale of the loss would stay as training.cuda_graphs = iteration has ..."
    ),
    "environment.device=cuda training.cuda_graphs=iteration logging.timing_log_level=1": (
        "logging.timing_log_level = 1: timers wait for the GPU, which training.cuda_graphs = iteration cannot; ..."
    ),
    "environment.device=cuda training.cuda_graphs=layer training.recompute_granularity=full "
    "training.recompute_method=uniform training.recompute_num_layers=1": (
        "training.recompute_granularity = 'full': a layer's graph (training.cuda_graphs = layer) can't be ..."
    ),
    "environment.device=cuda training.cuda_graphs=layer training.recompute_granularity=selective "
    "model.attention_dropout=0.1": (
        "training.recompute_granularity = 'selective': attention with dropout can't be recomputed in a graph ..."
    ),
    "environment.device=cuda training.cuda_graphs=layer megatron_args.num_experts=4": (
        "training.cuda_graphs = 'layer': how many tokens an expert gets is known to the CPU alone; choose attention"
    ),
    "environment.device=cuda training.cuda_graphs=layer training.eval_iters=1 data.mock=true data.paths=[] "
    "model.hidden_dropout=0.1": (
        "training.eval_iters = 1: validation would replay graphs that drop as in training ..."
    ),
    "training.fp8=delayed training.precision=bf16": (
        "training.fp8 = 'delayed': needs Transformer Engine and a GPU, environment.device is cpu; choose none"
    ),
    "environment.device=cuda training.fp8=delayed training.precision=fp32": (
        "training.fp8 = 'delayed': what is not in FP8 is in bf16, and training.precision is fp32; choose none"
    ),
    "environment.device=cuda megatron_args.fp8_format=hybrid": (
        "training.fp8 = 'none': megatron_args.fp8_format is given; choose delayed, tensorwise or blockwise"
    ),
    "environment.device=cuda training.fp8=tensorwise training.precision=bf16 model.ffn_hidden_size=100": (
        "model.ffn_hidden_size = 100: training.fp8 wants multiples of 16 * parallelism.tensor = 16; training.fp8=none"
    ),
}


def split_overrides(text):
    """'a=1 b=[2, 3]' -> ['a=1', 'b=[2, 3]']"""
    return re.split(r" (?=[a-z0-9_.]+\+?=)", text)


@pytest.mark.parametrize("overrides", REFUSED)
def test_refused_with_its_reason(base, overrides):
    expected = REFUSED[overrides]
    with pytest.raises(ConfigError) as caught:
        megatron_arguments(load_run(base, split_overrides(overrides)))
    message = str(caught.value)
    if expected.endswith("..."):
        assert message.startswith(expected.removesuffix("..."))
    else:
        assert message == expected


@pytest.mark.parametrize(
    "given",
    [
        "decoder_first_pipeline_num_layers=1",
        "pipeline_model_parallel_layout='Et|tttL'",
        "account_for_loss_in_pipeline_split=true",
    ],
)
def test_megatron_shares_layers_out_unevenly_where_it_is_told_to(base, given):
    layers = ["parallelism.pipeline=2", "model.num_layers=3", "environment.nodes=null"]
    with pytest.raises(ConfigError, match=r"do not share model\.num_layers = 3 evenly"):
        load_run(base, layers)
    assert load_run(base, [*layers, f"megatron_args.{given}"]).model.num_layers == 3


@pytest.mark.parametrize(
    "overrides",
    [
        "megatron_args={window_size: [8, 0], window_attn_skip_freq: [1, 0, 1, 1]}",
        "megatron_args.rope_scaling_factor=8.0",  # Megatron's own
        "megatron_args={num_experts: 4, moe_z_loss_coeff: 0.001}",
        "megatron_args.use_rope_scaling=true megatron_args.rope_scaling_factor=16 model.position_embedding_type=rope",
        "megatron_args={multi_latent_attention: true, rope_type: rope} model.rotary_percent=0.5",
        "megatron_args={hybrid_layer_pattern: '*-*-/*-', mtp_loss_scaling_factor: 0.3}",
        "megatron_args={multi_latent_attention: true, reset_position_ids: true}",  # with learned positions on top
    ],
)
def test_what_changes_something_is_passed_on(base, overrides):
    assert arguments(base, *split_overrides(overrides))


def test_the_table_of_refusals_is_large_enough():
    assert len(REFUSED) >= 60


def test_every_mistake_is_reported_at_once(base):
    with pytest.raises(ConfigError) as caught:
        load_run(base, ["model.num_layers=x", "model.swiglu=1", "optimizer.rate=1"])
    assert [line.partition(" ")[0] for line in str(caught.value).splitlines()] == [
        "model.num_layers",
        "model.swiglu",
        "optimizer.rate:",
    ]
    with pytest.raises(ConfigError) as caught:
        load_run(base, ["training.seq_length=252", "optimizer.min_lr=1"])
    assert len(str(caught.value).splitlines()) == 2


# --- files ---

FILES_REFUSED = {
    "model: {num_layers: 4": "line 1, column 22: not valid YAML",
    "model:\n  num_layers: 4\n  num_layers: 8\n": "line 3, column 3: not valid YAML: the key 'num_layers' occurs twice",
    "a: &x [1]\nb: *x\n": "line 1, column 4: not valid YAML: anchors and aliases are not supported",
    "a: &x [*x]": "not valid YAML: anchors and aliases are not supported",
    "a: !!python/object/apply:os.system ['touch pwned']": "could not determine a constructor for the tag",
    "a: 1\n---\nb: 2\n": "not valid YAML: but found another document",
    "- 1\n": "must hold a mapping of sections",
    "4\n": "must hold a mapping of sections",
    "1: 2\n": "not valid YAML: a key must be a plain name",
    "? [a, b]\n: 2\n": "not valid YAML: a key must be a plain name",
    "a: " + "[" * 3000: "not valid YAML: nested too deeply",
    "a: \x07": "not valid YAML",
    "extends: 4\nmodel: {}": "extends = 4: in ",
    "extends: [1]": "not a list of files; write [models/gpt.yaml, ...]",
    "extends: missing.yaml": "missing.yaml: No such file or directory; there are ",
    "extends: run.yaml": "files extend each other in a circle (run.yaml -> run.yaml); break the circle",
    "{}": "model: missing; every run needs it",
    "model.num_layers: 4\n": "model.num_layers: unknown key; write num_layers below model:",
}


@pytest.mark.parametrize("content", FILES_REFUSED, ids=lambda content: content[:30])
def test_file_refused_with_its_reason(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert FILES_REFUSED[content] in str(caught.value)
    assert not Path("pwned").exists()


def test_unreadable_files_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "run.yaml", tmp_path / "latin.yaml"):
        (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            load_run(path)


def test_extends_merges_in_order_relative_to_the_file(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "deep.yaml").write_text("model: {num_layers: 2, hidden_size: 64}\n")
    (tmp_path / "parts" / "a.yaml").write_text("extends: deep.yaml\nmodel: {num_layers: 4}\ndata: {vocab_size: 256}\n")
    (tmp_path / "parts" / "b.yaml").write_text("model: {num_attention_heads: 8}\ndata: {vocab_size: 512}\n")
    run_yaml = tmp_path / "run.yaml"
    run_yaml.write_text(
        "extends: [parts/a.yaml, parts/b.yaml]\n"
        "optimizer: {lr: 1e-3}\ntraining: {train_iters: 9, seq_length: 8, global_batch_size: 1}\ndata:\n"
    )
    run = load_run(run_yaml, ["model.hidden_size=128", "data={paths: [c]}"])
    assert (run.model.num_layers, run.model.hidden_size, run.model.num_attention_heads) == (4, 128, 8)
    assert (run.data.paths, run.data.vocab_size) == (["c"], 512)  # an empty heading changes nothing


SECTIONS_MERGE_VALUES_REPLACE = [
    # a key, what a file says, what one that extends it or the command line says, what holds
    ("data.paths", "{paths: {a: 0.7, b: 0.3}}", "{paths: {c: 1.0}}", {"c": 1.0}),
    ("data.paths", "{paths: {a: 0.7, b: 0.3}}", "{paths+: {c: 1.0, b: 0.5}}", {"a": 0.7, "b": 0.5, "c": 1.0}),
    ("data.paths", "{paths: {a: 0.7}}", "{paths: [c]}", ["c"]),
    ("data.paths", "{paths: [a, b]}", "{paths: [c]}", ["c"]),
    ("data.paths", "{paths: [a, b]}", "{paths+: [c]}", ["a", "b", "c"]),
    ("data.paths", "{vocab_size: 300}", "{paths+: [c]}", ["c"]),
    ("data.vocab_size", "{vocab_size: 300, paths: [a]}", "{paths: [c]}", 300),
    ("environment.variables", "{variables: {A: 1, B: 2}}", "{variables: {C: 3}}", {"C": 3}),
    ("environment.variables", "{variables: {A: 1, B: 2}}", "{variables+: {B: 3}}", {"A": 1, "B": 3}),
    ("slurm.sbatch", "{sbatch: {partition: gpu, time: 9}}", "{sbatch: {time: 8}}", {"time": 8}),
    ("slurm.sbatch", "{sbatch: {partition: gpu}}", "{sbatch: {}}", {}),
    (
        "megatron_args",
        "{log_progress: true, recompute-modules: [mlp]}",
        "{log-progress: null, recompute_modules+: [moe]}",
        {"log_progress": None, "recompute_modules": ["mlp", "moe"]},
    ),
]


@pytest.mark.parametrize(("key", "parent", "child", "holds"), SECTIONS_MERGE_VALUES_REPLACE)
def test_sections_merge_and_values_replace_in_files_and_on_the_command_line(base, tmp_path, key, parent, child, holds):
    section = key.partition(".")[0]
    (tmp_path / "parent.yaml").write_text(f"extends: run.yaml\n{section}: {parent}\n")
    (tmp_path / "child.yaml").write_text(f"extends: parent.yaml\n{section}: {child}\n")
    by_key = [f"{section}.{name}={dump(value)}" for name, value in parse(child, "child").items()]
    for path, overrides in (("child", []), ("parent", [f"{section}={child}"]), ("parent", by_key)):
        assert attrgetter(key)(load_run(tmp_path / f"{path}.yaml", overrides)) == holds


def test_one_entry_of_a_table_is_set_on_the_command_line(base):
    run = load_run(base, ["data.paths={a: 1}", "data.paths.corpus/v1.5=0.5", "slurm.sbatch.time=60", "model={}"])
    assert (run.data.paths, run.slurm.sbatch) == ({"a": 1.0, "corpus/v1.5": 0.5}, {"time": 60})


def test_a_file_may_be_extended_twice_but_not_in_a_circle(tmp_path):
    (tmp_path / "leaf.yaml").write_text(BASE)
    (tmp_path / "a.yaml").write_text("extends: leaf.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: leaf.yaml\n")
    (tmp_path / "diamond.yaml").write_text("extends: [a.yaml, b.yaml]\n")
    assert load_run(tmp_path / "diamond.yaml").model.num_layers == 4
    (tmp_path / "leaf.yaml").write_text("extends: diamond.yaml\n")
    with pytest.raises(ConfigError, match=r"circle \(diamond.yaml -> a.yaml -> leaf.yaml -> diamond.yaml\)"):
        load_run(tmp_path / "diamond.yaml")


# --- YAML 1.2, in and out ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5E3", 1500.0),
        ("-.5", -0.5),
        (".inf", float("inf")),
        ("no", "no"),
        ("on", "on"),
        ("010", 10),
        ("0x10", 16),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("'4'", "4"),
        ("True", True),
        ("~", None),
        ("", None),
        ("1.2.3", "1.2.3"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    assert parse(text, "test") == value
    assert type(parse(text, "test")) is type(value)


scalars = st.none() | st.booleans() | st.integers(-(10**29), 10**29) | st.floats(allow_nan=False) | st.text()
trees = st.recursive(scalars, lambda sub: st.lists(sub) | st.dictionaries(st.text(), sub), max_leaves=20)


@unhurried
@given(st.dictionaries(st.text(), trees))
def test_what_is_dumped_reads_back(content):
    assert parse(dump(content), "test") == content


@unhurried
@given(st.text() | st.text(alphabet="{}[]:,-#&*!|>'\"%@` \n\tab.=1"))
def test_any_text_is_parsed_or_refused(text):
    with contextlib.suppress(ConfigError):  # any other exception fails the test
        parse(text, "test")


@unhurried
@given(override=st.text() | st.from_regex(r"(model|data|training|megatron_args)\.[a-z_]+=.{0,12}", fullmatch=True))
def test_any_override_is_applied_or_refused(override, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(BASE)
    with contextlib.suppress(ConfigError):
        load_run(path, [override])


# --- what it compiles to ---


def test_compiles_to_megatrons_arguments(base):
    text = arguments(base)
    for expected in (
        "--num-layers 4 ",
        "--tensor-model-parallel-size 1 ",
        "--pipeline-model-parallel-size 2 ",
        "--context-parallel-size 4 ",
        "--cp-comm-type attention2d ",
        "--hierarchical-context-parallel-sizes 2 2 ",
        "--max-position-embeddings 256 ",
        "--lr 0.001 ",
        "--data-path data/python-standard-library ",
        "--save runs/run/checkpoints --save-interval 60 ",
        "--load runs/run/checkpoints ",
        "--run-dir runs/run ",
    ):
        assert expected in text
    for absent in (
        "--bf16",
        "--fp16",
        "--disable-bias-linear",
        "--num-query-groups",
        "--tensorboard-dir",
        "--mock-data",
        "--attention2d-head-groups",  # one, the default, without a description of the cluster
    ):
        assert absent not in text


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("context_parallel.mode=ring", "--cp-comm-type p2p "),
        ("context_parallel.mode=all_gather", "--cp-comm-type all_gather "),
        ("context_parallel.mode=ulysses", "--cp-comm-type a2a "),
        (
            "context_parallel.layer_modes=[attention2d, ring, all_gather, ulysses]",
            "--cp-comm-type attention2d p2p all_gather a2a ",
        ),
        ("context_parallel.grid=[2, 1, 2]", "--hierarchical-context-parallel-sizes 2 1 2 "),
        ("context_parallel.grid=[1, 2, 2]", "--hierarchical-context-parallel-sizes 2 2 "),
        ("context_parallel.grid=[2, 2] context_parallel.tile=[1, 2]", "--hierarchical-context-parallel-sizes 1 2 2 1 "),
        (
            "context_parallel.grid=[2, 2, 1] context_parallel.tile=[1, 1]",
            "--hierarchical-context-parallel-sizes 2 1 1 2 1 ",
        ),
        ("context_parallel.head_groups=2", "--attention2d-head-groups 2 "),
        ("context_parallel.grid=[4, 1]", "--hierarchical-context-parallel-sizes 4 1 "),
        ("context_parallel.grid=[1, 4]", "--hierarchical-context-parallel-sizes 1 4 "),
        ("model.num_query_groups=1", "--hierarchical-context-parallel-sizes 4 1 "),
        ("model.num_query_groups=2", "--group-query-attention --num-query-groups 2 "),
        ("model.kind=hybrid", "--hybrid-layer-pattern *-*-|*-*- "),
        ("model.kind=hybrid parallelism.virtual_pipeline=2", "--hybrid-layer-pattern *-|*-|*-|*- "),
        (
            "model.kind=hybrid context_parallel.layer_modes=[ring, attention2d, attention2d, ring]",
            "--cp-comm-type p2p p2p attention2d attention2d attention2d attention2d p2p p2p ",
        ),
        (
            "model.kind=hybrid megatron_args={num_experts: 4, moe_layer_freq: 2, mtp_num_layers: 2} "
            "model.position_embedding_type=rope",
            "--hybrid-layer-pattern *E*-|*E*-/*-/*- ",
        ),
        (
            "model.kind=hybrid megatron_args={multi_latent_attention: true, window_size: [8, 0], "
            "window_attn_skip_freq: 2}",
            "--window-attn-skip-freq [1,1,0,0,1,1,0,0] --hybrid-layer-pattern +-+-|+-+- ",
        ),
        (
            "model.kind=hybrid model.position_embedding_type=rope megatron_args.no_rope_freq=2",
            "--no-rope-freq [0,0,1,1,0,0,1,1] --hybrid-layer-pattern *-*-|*-*- ",
        ),
        (
            "model.kind=hybrid megatron_args={hybrid_layer_pattern: 'M*M*|-*M*M', window_size: [8, 0], "
            "window_attn_skip_freq: [0, 1, 1, 0]}",
            "--hybrid-layer-pattern M*M*|-*M*M --window-size 8,0 --window-attn-skip-freq [0,0,0,1,1,1,1,0,0] ",
        ),
        (f"{ROPE} model.rope_scaling=linear model.rope_scaling_factor=4", "--rotary-seq-len-interpolation-factor 4 "),
        # 10000 * 4^(32 / 30), heads of 32
        (f"{ROPE} model.rope_scaling=ntk model.rope_scaling_factor=4", "--rotary-base 43873 "),
        (
            f"{ROPE} model.rope_scaling=llama3 model.rope_scaling_factor=16",
            "--use-rope-scaling --rope-scaling-factor 16.0 ",
        ),
        (
            f"{ROPE} model.rope_scaling=yarn model.rope_scaling_factor=4 model.rope_original_length=128",
            "--position-embedding-type yarn --max-position-embeddings 256 --rotary-scaling-factor 4.0 "
            "--yarn-original-max-position-embeddings 128 ",
        ),
        (
            f"{FULL} training.keep_attention_outputs=true training.offload_activations=true "
            "training.loss_chunk_tokens=64",
            "--recompute-num-layers 1 --offload-activations --loss-chunk-tokens 64 ",
        ),
        (f"{FULL} training.keep_attention_outputs=true", "--keep-attention-outputs "),
        ("training.precision=bf16", "--bf16 "),
        ("environment.device=cuda training.cuda_graphs=layer", "--cuda-graph-impl local "),
        (
            "environment.device=cuda training.precision=bf16 training.cuda_graphs=attention",
            "--cuda-graph-impl transformer_engine --cuda-graph-modules attn ",
        ),
        ("environment.device=cuda training.cuda_graphs=iteration", "--cuda-graph-impl full_iteration "),
        (
            "environment.device=cuda training.precision=bf16 training.cuda_graphs=layer "
            "megatron_args.cuda_graph_impl=transformer_engine",
            "--cuda-graph-impl transformer_engine ",
        ),
        (
            "environment.device=cuda training.precision=bf16 training.fp8=delayed",
            "--fp8-recipe delayed --fp8-format hybrid ",
        ),
        (
            "environment.device=cuda training.precision=bf16 training.fp8=blockwise",
            "--fp8-recipe blockwise --fp8-format e4m3 ",
        ),
        (
            "environment.device=cuda training.precision=bf16 training.fp8=delayed megatron_args.fp8_format=e4m3",
            "--fp8-format e4m3 ",
        ),
        ("model.add_bias_linear=false", "--disable-bias-linear "),
        ("data.paths=[a, b]", "--data-path a b "),
        ("data.paths={a: 0.3, b: 0.7}", "--data-path 0.3 a 0.7 b "),
        ("data.mock=true", "--mock-data "),
        ("data.split='98,2,0' training.eval_iters=3 training.eval_interval=20", "--eval-iters 3 "),
        ("training.eval_interval=20", "--eval-interval 20 "),
        ("logging.tensorboard=true run.dir=/x/y", "--tensorboard-dir /x/y/tensorboard "),
        ("logging.wandb_project=p run.name=n", "--tensorboard-dir runs/n/tensorboard "),
        ("logging.attention_communication=true", "--log-attention-communication "),
        ("cluster.peak_tflops=989", "--peak-tflops 989"),
        ("checkpoint.keep_last=3", "--keep-last 3 "),
        ("logging.wandb_project=p run.name=n", "--wandb-project p --timing-log-level 0 "),
        ("logging.wandb_project=p run.name=n", "--wandb-exp-name n --wandb-save-dir runs/n/wandb "),
        ("checkpoint.save_interval=7", "--save-interval 7 "),
        ("megatron_args.ddp_bucket_size=1000", "--ddp-bucket-size 1000 "),
        ("megatron_args={recompute-modules: [mlp, moe]}", "--recompute-modules mlp moe "),
        ("megatron_args.log_progress=true", "--log-progress "),
    ],
)
def test_key_to_argument(base, overrides, expected):
    assert expected in arguments(base, *split_overrides(overrides))


def test_switching_mode_changes_attention_alone(base):
    attention = r"--cp-comm-type \S+ (--hierarchical-context-parallel-sizes \d+ \d+ )?"
    texts = {
        re.sub(attention, "", arguments(base, f"context_parallel.mode={m}"))
        for m in ("attention2d", "ring", "all_gather")
    }
    assert len(texts) == 1


def test_modes_other_than_attention2d_and_one_rank_have_no_grid(base):
    for override in ("context_parallel.mode=ring", "context_parallel.mode=all_gather", "context_parallel.size=1"):
        assert "hierarchical" not in arguments(base, override)


def test_false_and_null_take_back_an_argument_of_an_extended_file(base):
    for value in ("false", "null"):
        given = ["megatron_args.log_progress=true", f"megatron_args.log_progress={value}"]
        assert "--log-progress" not in arguments(base, *given)
    assert "--qk-clip" not in arguments(base, "megatron_args.qk_clip=false")
    assert "--window-size 512,0 " in arguments(base, "megatron_args.window-size=[512, 0]")
    base.write_text(BASE + "megatron_args: {num-experts: 8}\n")
    assert "--num-experts" not in arguments(base, "megatron_args.num_experts=null")


def test_a_run_continues_from_its_own_checkpoint_before_anothers(base, tmp_path):
    overrides = [f"run.dir={tmp_path}/mine", "checkpoint.load=/theirs"]
    assert "--load /theirs " in arguments(base, *overrides)
    assert "--load" not in arguments(base, f"run.dir={tmp_path}/mine", "checkpoint.save=false")
    begun = tmp_path / "mine" / "checkpoints" / "iter_0000004"
    begun.mkdir(parents=True)
    (begun / ".metadata").touch()
    assert "--load /theirs " in arguments(base, *overrides), "killed in its first save"
    (begun / "metadata.json").touch()
    assert f"--load {tmp_path}/mine/checkpoints " in arguments(base, *overrides)


def test_libraries_that_a_key_needs_are_named_when_missing(base, monkeypatch):
    find_spec, cuda = importlib.util.find_spec, "environment.device=cuda"
    missing = {"wandb", "nvidia_resiliency_ext"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else find_spec(name))
    with pytest.raises(ConfigError, match=r"wandb_project = 'p': wandb is not installed; pip install 'megatron-attn2d"):
        load_run(base, ["logging.wandb_project=p"])
    with pytest.raises(ConfigError, match=r"async_save = true: .* by nvidia_resiliency_ext, which is not installed"):
        load_run(base, ["checkpoint.async_save=true"])
    missing.clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    assert "--async-save --use-persistent-ckpt-worker " in arguments(base, cuda, "checkpoint.async_save=true")
    assert "--async-save --run-dir" in arguments(base, "checkpoint.async_save=true")
    key = "logging.attention_communication=true"
    with pytest.raises(ConfigError, match="mode = ring is Transformer Engine's, whose messages are not followed"):
        load_run(base, [key, cuda, "context_parallel.mode=ring"])
    assert load_run(base, [key, cuda]).logging.attention_communication


def test_every_flag_is_one_of_megatrons(base):
    """A renamed argument of upstream's must not wait for a run to be found."""
    from megatron_attn2d.config.arguments import _owners
    from megatron_attn2d.training.own_arguments import add_own_arguments

    own = add_own_arguments(ArgumentParser())._option_string_actions
    known = {flag.removeprefix("--") for flag in (*upstream_flags.options(), *own)}
    assert {flag: key for flag, key in _owners().items() if flag not in known} == {}


def test_the_table_of_upstreams_arguments_is_that_of_its_parser(monkeypatch):
    """After moving the pin: python -m megatron_attn2d.config.upstream_flags"""
    assert upstream_flags.options() == upstream_flags.described()
    upstream_flags.options.cache_clear()
    asked = []
    monkeypatch.setattr(upstream_flags, "described", lambda: asked.append(1) or {})
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19.999")
    assert upstream_flags.options() == {}, "another version's are read from its parser"
    upstream_flags.options.cache_clear()


@pytest.mark.parametrize(("begun", "now"), [("[7, 0]", "'7,0'"), ("'7,0'", "[7, 0]")])
def test_a_run_is_continued_with_the_same_in_other_words(base, begun, now, tmp_path):
    directory = [f"run.dir={tmp_path / 'run'}", "data.mock=true"]
    (tmp_path / "run").mkdir()
    run = load_run(base, [*directory, f"megatron_args.window_size={begun}"])
    (tmp_path / "run" / "config.yaml").write_text(resolved_yaml(run))
    with mock.patch("megatron_attn2d.run.checkpoints.last_complete", return_value=1):
        check_files(load_run(base, [*directory, f"megatron_args.window_size={now}"]))
        with pytest.raises(ConfigError, match=r"megatron_args.window_size = \[8, 0\]: the run in .* was begun with"):
            check_files(load_run(base, [*directory, "megatron_args.window_size=[8, 0]"]))


def test_upstreams_parser_takes_what_we_compile(base):
    *tokens, run_dir_flag, _ = megatron_arguments(load_run(base, ["parallelism.virtual_pipeline=2"]))
    assert run_dir_flag == "--run-dir"
    args = upstream_flags.parser().parse_args(tokens)
    assert args.hierarchical_context_parallel_sizes == [2, 2]
    assert args.cp_comm_type == ["attention2d"]
    assert args.num_virtual_stages_per_pipeline_rank == 2


def test_the_embedded_data_set_is_where_it_is_built(base, tmp_path, monkeypatch):
    from megatron_attn2d.data import indexed

    monkeypatch.setattr(indexed, "build", lambda files, prefix: prefix)
    run = load_run(base, [f"data.dir={tmp_path}"])
    assert str(indexed.build_default(run.data.dir)) == embedded_data(run)


# --- ranks ---


@pytest.mark.parametrize(
    ("overrides", "world_size", "ranks", "replicas"),
    [
        ("run.name=x", None, 8, 1),
        ("parallelism.data=2", None, 16, 2),
        ("run.name=x", 32, 32, 4),
        ("parallelism.data=4", 32, 32, 4),
        ("environment.device=cuda environment.gpus_per_node=8", None, 8, 1),
        ("environment.device=cuda environment.gpus_per_node=8 environment.nodes=4", None, 32, 4),
        ("environment.device=cuda environment.gpus_per_node=8 environment.nodes=4", 32, 32, 4),
    ],
)
def test_replicas_are_what_the_world_leaves(base, overrides, world_size, ranks, replicas):
    run = load_run(base, split_overrides(overrides), world_size=world_size)
    assert (run.world_size, run.data_parallel_size) == (ranks, replicas)


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        ("run.name=x", 12, "world size = 12: not a multiple of"),
        ("parallelism.data=2", 8, "parallelism.data = 2: with 8 ranks per replica that is 16 ranks, but there are 8"),
        (
            "environment.device=cuda environment.gpus_per_node=8 environment.nodes=2",
            8,
            "environment.nodes = 2: 16 ranks in all, but 8 were started; start 16, or override environment.nodes",
        ),
    ],
)
def test_ranks_that_do_not_fit_are_refused(base, overrides, world_size, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_run(base, split_overrides(overrides), world_size=world_size)


# --- round trip and the files that we ship ---


def test_resolved_yaml_loads_back_to_the_same_run(base, tmp_path):
    run = load_run(
        base, ["data.paths={a: 1, b: 2.5}", "megatron_args.note=1e-4", "environment.variables={A: 'no', B: 3}"]
    )
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(resolved_yaml(run))
    assert load_run(resolved) == run
    assert yaml.safe_load(resolved.read_text())["parallelism"]["data"] == 1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_runs_resolve(path):
    run = load_run(path)
    assert megatron_arguments(run)
    assert run.run.name == path.stem


def test_importing_and_checking_needs_no_torch(base):
    code = f"import sys; from megatron_attn2d.config import load_run; load_run({str(base)!r}); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "megatron"} & set(result.stdout.split())


def test_public_names():
    assert all(hasattr(config, name) for name in config.__all__)


CONTINUED = {
    "run.name=x logging.tensorboard=true context_parallel.mode=ring training.micro_batch_size=2": "",
    "megatron_args.log_progress=true megatron_args.recompute_modules=[mlp] megatron_args.ddp_bucket_size=9": "",
    # the learning rate's course
    "training.train_iters=80": (
        "training.train_iters = 80: the run in {run} was begun with 60; choose 60, or another run.dir, or name it in "
        "checkpoint.may_change"
    ),
    "training.train_iters=80 checkpoint.may_change=[training.train_iters]": "",
    "optimizer.lr=1e-4": "optimizer.lr = 0.0001: the run in {run} was begun with 0.001; choose 0.001, or another ...",
    "optimizer.lr=1e-4 checkpoint.may_change=[training.seed]": "optimizer.lr = 0.0001: the run in {run} was begun ...",
    "optimizer.lr_decay_iters=100": "optimizer.lr_decay_iters = 100: the run in {run} was begun with null; choose ...",
    "megatron_args.lr_warmup_init=1e-5": "megatron_args.lr_warmup_init = 1e-05: the run in {run} was begun ...",
    # the order of the data
    "training.seed=3": "training.seed = 3: the run in {run} was begun with 1234; choose 1234, or another ...",
    "training.seq_length=128": "model.max_position_embeddings = 128: the run in {run} was begun with 256; choose ...",
    "training.seq_length=128 model.max_position_embeddings=256": (
        "training.seq_length = 128: the run in {run} was begun with 256; choose 256, or another run.dir, or name it ..."
    ),
    "training.seq_length=512 training.seed=3 checkpoint.may_change=[training.seed,training.seq_length]": (
        # learned positions
        "model.max_position_embeddings = 512: the run in {run} was begun with 256; choose 256, or another run.dir"
    ),
    "data.split='98,1,1'": "data.split = '98,1,1': the run in {run} was begun with '1,0,0'; choose '1,0,0', or ...",
    "data.mock=false": "data.mock = false: the run in {run} was begun with true; choose true, or another ...",
    "megatron_args.dataloader_type=cyclic": "megatron_args.dataloader_type = 'cyclic': the run in {run} was begun ...",
    # the loss
    "model.hidden_dropout=0.1": "model.hidden_dropout = 0.1: the run in {run} was begun with 0.0; choose 0.0, or ...",
    "megatron_args.eod_mask_loss=true": "megatron_args.eod_mask_loss = true: the run in {run} was begun with null; ...",
    "megatron_args.eod_mask_loss=true checkpoint.may_change=[megatron_args.eod_mask_loss]": "",
    "megatron_args.rotary_seq_len_interpolation_factor=2": "megatron_args.rotary_seq_len_interpolation_factor = 2: ...",
    "megatron_args.no_rope_freq=4": "megatron_args.no_rope_freq = 4: the run in {run} was begun with null; ...",
    "megatron_args.rope_type=yarn": "megatron_args.rope_type = 'yarn': the run in {run} was begun with null; ...",
    "megatron_args.rotary_scaling_factor=8": "megatron_args.rotary_scaling_factor = 8: the run in {run} was begun ...",
    "megatron_args.mscale_all_dim=1": "megatron_args.mscale_all_dim = 1: the run in {run} was begun with null; ...",
    "megatron_args.moe_z_loss_coeff=0.1": "megatron_args.moe_z_loss_coeff = 0.1: the run in {run} was begun ...",
    # weights and states
    "model.num_layers=2": "model.num_layers = 2: the run in {run} was begun with 4; choose 4, or another run.dir",
    "model.kind=hybrid": "",
    "model.swiglu=true": "model.swiglu = true: the run in {run} was begun with false; choose false, or another run.dir",
    "model.rotary_base=100": "model.rotary_base = 100: the run in {run} was begun with null; choose null, or ...",
    "model.norm_epsilon=0.1": "model.norm_epsilon = 0.1: the run in {run} was begun with null; choose null, or ...",
    "model.max_position_embeddings=256": "",
    "training.precision=bf16": "training.precision = 'bf16': the run in {run} was begun with 'fp32'; choose ...",
    "optimizer.adam_beta1=0.8": "optimizer.adam_beta1 = 0.8: the run in {run} was begun with 0.9; choose 0.9, or ...",
    "optimizer.use_distributed_optimizer=true": (
        "optimizer.use_distributed_optimizer = true: the run in {run} was begun with false; choose false, or another "
        "run.dir"
    ),
    "megatron_args.window_size=[7,0]": (
        "megatron_args.window_size = [7, 0]: the run in {run} was begun with null; choose null, or another run.dir"
    ),
    "megatron_args.num_experts=4": "megatron_args.num_experts = 4: the run in {run} was begun with null; choose ...",
    "megatron_args.hybrid_override_pattern='*-'": "megatron_args.hybrid_override_pattern = '*-': the run in {run} ...",
    "megatron_args.squared_relu=false megatron_args.log_progress=true": "",
    "megatron_args.softmax_type=vanilla megatron_args.v_head_dim='128' megatron_args.rope_scaling_factor=8": "",
    "data.vocab_size=1024": "data.vocab_size = 1024: the run in {run} was begun with 512; choose 512, or another ...",
}


@pytest.mark.parametrize("overrides", CONTINUED)
def test_a_run_is_continued_as_it_was_begun(base, tmp_path, overrides):
    given = [f"run.dir={tmp_path}/mine", "data.mock=true"]
    changed = load_run(base, [*given, *split_overrides(overrides)])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text(resolved_yaml(load_run(base, given)))
    assert not [*check_continued(changed)]  # nothing has been saved yet
    write_checkpoint(tmp_path / "mine", 4)
    messages = [str(error) for error in check_continued(changed)]
    expected = CONTINUED[overrides].format(run=tmp_path / "mine")
    if expected.endswith("..."):
        assert messages[0].startswith(expected.removesuffix("..."))
    else:
        assert messages == ([expected] if expected else [])


def test_a_gpt_does_not_go_on_from_a_hybrid_model(base, tmp_path):
    (tmp_path / "config.yaml").write_text(resolved_yaml(load_run(base, ["model.kind=hybrid", f"run.dir={tmp_path}"])))
    write_checkpoint(tmp_path, 4)
    [error] = check_continued(load_run(base, [f"run.dir={tmp_path}"]))
    assert str(error).startswith(f"model.kind = 'gpt': the run in {tmp_path} was begun with 'hybrid'; choose 'hybrid'")


def test_a_start_that_saved_nothing_leaves_the_run_as_it_was(base, tmp_path):
    given = [f"run.dir={tmp_path}", "data.mock=true"]
    write_checkpoint(tmp_path, 4)
    (tmp_path / "config.yaml").write_text(resolved_yaml(load_run(base, given)))
    keep_configuration(tmp_path / "checkpoints", 4, tmp_path)
    (tmp_path / "config.yaml").write_text(resolved_yaml(load_run(base, [*given, "training.seed=3"])))
    assert not [*check_continued(load_run(base, given))]
    begin_save(tmp_path / "checkpoints", 4)
    for name in (".metadata", "metadata.json"):
        (tmp_path / "checkpoints" / "iter_0000004" / name).touch()
    assert [error.key for error in check_continued(load_run(base, given))] == ["training.seed"]


def write_checkpoint(run_dir, step):
    """What a complete checkpoint leaves in a run's directory, but for its content."""
    folder = run_dir / "checkpoints" / f"iter_{step:07d}"
    folder.mkdir(parents=True)
    for name in (".metadata", "metadata.json"):
        (folder / name).touch()
    (folder.parent / "latest_checkpointed_iteration.txt").write_text(str(step))


def test_lists_of_keys_name_keys():
    named = {*keys.SCHEDULE, *keys.ORDER, *keys._FREE, *keys._FIXED, *(f"megatron_args.{n}" for n in keys.FIRST_START)}
    assert not [key for key in named if not keys.is_key(key)]
    groups = {option.group for option in upstream_flags.options().values()}
    assert keys._FREE_GROUPS | {keys._SCHEDULE_GROUP} <= groups


def test_an_argument_that_nobody_has_classified_is_compared():
    """By far the most of Megatron's arguments about model, data and loss."""
    compared = {
        flag
        for flag, option in upstream_flags.options().items()
        if option.group in {"network size", "regularization", "data and dataloader", "mla", "moe", "mixed precision"}
        and not keys._is_free(flag.removeprefix("--").replace("-", "_"))
    }
    assert len(compared) > 100


def test_a_start_from_others_weights_is_made_once(base, tmp_path):
    given = [f"run.dir={tmp_path}/mine", "data.mock=true"]
    theirs = f"{tmp_path}/theirs/checkpoints"
    write_checkpoint(tmp_path / "theirs", 4)
    begin = [*given, f"checkpoint.start_from={theirs}", "megatron_args.ckpt_step=4"]
    assert f"--load {tmp_path}/mine/checkpoints --pretrained-checkpoint {theirs} " in arguments(base, *begin)
    assert "--ckpt-step 4" in arguments(base, *begin)
    unsaved = arguments(base, *begin, "checkpoint.save=false")
    assert f"--pretrained-checkpoint {theirs} " in unsaved
    assert "--load" not in unsaved
    onward = [*given, f"checkpoint.load={theirs}", "megatron_args={no_load_optim: true, no_load_rng: true}"]
    assert f"--load {theirs} " in arguments(base, *onward)
    assert "--no-load-optim --no-load-rng" in arguments(base, *onward)
    assert not left_out(load_run(base, onward))
    write_checkpoint(tmp_path / "mine", 3)
    for overrides in (begin, onward):
        continued = arguments(base, *overrides)
        assert continued == arguments(base, *given)
    assert left_out(load_run(base, onward)) == [
        *("checkpoint.load", "megatron_args.no_load_optim", "megatron_args.no_load_rng"),
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("", ""),
        ("megatron_args.ckpt_step=4", ""),
        (
            "megatron_args.ckpt_step=5",
            "megatron_args.ckpt_step = 5: there is no checkpoint of that step in {theirs}; complete ones: 4",
        ),
        (
            "training.train_iters=80",
            "training.train_iters = 80: the run in {run} was begun with 60; choose 60, or another checkpoint.load, or "
            "name it in checkpoint.may_change, or take the weights alone by checkpoint.start_from",
        ),
        (
            "model.num_layers=2",
            "model.num_layers = 2: the run in {run} was begun with 4; choose 4, or another checkpoint.load",
        ),
    ],
)
def test_what_a_start_reads_of_another_run_must_fit(base, tmp_path, overrides, expected):
    theirs = tmp_path / "theirs"
    write_checkpoint(theirs, 4)
    (theirs / "config.yaml").write_text(resolved_yaml(load_run(base, ["data.mock=true"])))
    given = [f"run.dir={tmp_path}/mine", "data.mock=true", f"checkpoint.load={theirs}/checkpoints"]
    run = load_run(base, [*given, *split_overrides(overrides)] if overrides else given)
    message = expected.format(run=theirs, theirs=theirs / "checkpoints")
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$") if expected else contextlib.nullcontext():
        check_files(run)
    if "ckpt_step" not in overrides:
        (theirs / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("9")
        with pytest.raises(ConfigError, match="names it, but there is no checkpoint of that step in "):
            check_files(run)


def test_a_runs_directory_in_place_of_its_checkpoints_is_told(base, tmp_path):
    write_checkpoint(tmp_path / "theirs", 4)
    given = [f"run.dir={tmp_path}/mine", "data.mock=true", f"checkpoint.start_from={tmp_path}/theirs"]
    with pytest.raises(ConfigError, match=f"; name {re.escape(str(tmp_path))}/theirs/checkpoints, or null$"):
        check_files(load_run(base, given))
