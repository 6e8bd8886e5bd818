"""Checks that data sets, tokenizer and documents fit the run."""

from collections.abc import Iterator

from megatron_attn2d.config.checks.refusal import Refusal
from megatron_attn2d.config.layer_pattern import MTP
from megatron_attn2d.config.prefixes import prefix_fault
from megatron_attn2d.config.schema import RunConfig

_EMBEDDED_EXAMPLE = 512
"""Tokens of the longest example that `data.docstrings` builds."""
_RECURRENT = {"M", "G"}
"""Layers of a hybrid model that carry a state from token to token: Mamba and gated delta net."""

_NOT_IN_BINS = {
    "multi_latent_attention": ("+", "rotates by the positions of the whole sample where documents are bins"),
    "mtp_num_layers": (MTP, "would predict a neighbour's tokens where documents are bins"),
    "num_experts": ("E", "would balance padding too where documents are bins"),
}
"""Arguments of Megatron's, their symbols in the pattern of a hybrid model, and why they aren't served with bins."""


def check_data(run: RunConfig) -> Iterator[Refusal]:
    """Refuse weights of the three parts, data sets and tokenizers that do not go together."""
    yield from _check_split(run)
    yield from _check_paths(run)
    yield from _check_tokenizer(run)


def check_documents(run: RunConfig) -> Iterator[Refusal]:
    """Refuse documents that are sequences of their own where chunks, stages, graphs or layers do not allow it."""
    if run.document_multiple:
        yield from _check_examples(run)
        yield from _check_places(run)
        yield from _check_across_documents(run)
        yield from _check_bins(run)
        return
    for key in ("document_multiple", "document_bins"):
        if getattr(run.data, key):
            yield f"data.{key}", "data.document_masking is false", "choose null, or document_masking=true"


def _check_examples(run: RunConfig) -> Iterator[Refusal]:
    data = run.data
    if data.format == "sft" and data.mock:
        yield "data.format", "made-up data (data.mock) holds no examples", "choose text, or data.mock=false"
    elif data.format == "sft" and not data.paths and run.training.seq_length < _EMBEDDED_EXAMPLE:
        reason = f"an example of the embedded data set has up to {_EMBEDDED_EXAMPLE} tokens, and is not cut"
        yield "training.seq_length", reason, f"choose {_EMBEDDED_EXAMPLE} or more, or name data.paths"


def _check_places(run: RunConfig) -> Iterator[Refusal]:
    """Refusals about where documents may begin, and how many samples of them may go through at once."""
    multiple = run.document_multiple
    chunks = 2 * run.context_parallel.size
    if multiple % chunks:
        yield (
            "data.document_multiple",
            f"not a multiple of 2 * context_parallel.size = {chunks}, the chunks of a document",
            f"choose {-(-multiple // chunks) * chunks}, or null",
        )
    elif run.training.seq_length % multiple:
        length = -(-run.training.seq_length // multiple) * multiple
        reason = f"not a multiple of data.document_multiple = {multiple}, where documents begin"
        yield "training.seq_length", reason, f"choose {length}"
    if run.training.micro_batch_size > 1 and run.parallelism.pipeline > 1:
        reason = "documents of several samples go through as one sequence, for which pipeline stages are not prepared"
        yield "training.micro_batch_size", reason, "choose 1, and a longer training.seq_length"


def _check_across_documents(run: RunConfig) -> Iterator[Refusal]:
    """Refuse layers that carry a state from one document into the next."""
    data, given = run.data, run.megatron_args
    masking = "data.format = sft" if data.format == "sft" else "data.document_masking"
    other = "leave it out" if data.format == "sft" else "leave it out, or data.document_masking=false"
    if given.get("reset_position_ids"):
        reason = f"{masking} begins positions anew in each document already"
        yield "megatron_args.reset_position_ids", reason, "leave it out"
    balancing = given.get("moe_router_load_balancing_type")
    if {"quantile_balancing", "sinkhorn"} & set(balancing if isinstance(balancing, list) else [balancing]):
        reason = f"it would balance the padding of {masking} too"
        yield "megatron_args.moe_router_load_balancing_type", reason, "choose aux_loss"
    for name in ("experimental_attention_variant", "linear_attention_freq"):
        if given.get(name):
            reason = f"its layers would carry what they know from a document into the next, under {masking}"
            yield f"megatron_args.{name}", reason, other
    if layers := sorted(set(str(given.get("hybrid_layer_pattern") or "")) & _RECURRENT):
        reason = f"layers {', '.join(layers)} would carry what they know from a document into the next, under {masking}"
        yield "megatron_args.hybrid_layer_pattern", reason, "choose * or +"


def _check_bins(run: RunConfig) -> Iterator[Refusal]:
    """Refuse layers that can't be told of a fixed number of documents, as CUDA graphs ask for."""
    if not run.documents_in_bins:
        return
    in_graphs = run.graph_implementation != "none"
    key, without = ("training.cuda_graphs", "none") if in_graphs else ("data.document_bins", "null")
    masking = "data.format = sft" if run.data.format == "sft" else "data.document_masking"
    pattern = str(run.megatron_args.get("hybrid_layer_pattern") or "")
    for name, (symbol, why) in _NOT_IN_BINS.items():
        if run.megatron_args.get(name) or symbol in pattern:
            yield key, f"megatron_args.{name} {why}, under {masking}", f"choose {without}"


def _check_split(run: RunConfig) -> Iterator[Refusal]:
    data = run.data
    try:
        training, validation, _ = map(float, data.split.split(","))
    except ValueError:
        yield "data.split", "not three numbers", "write 98,1,1"
        return
    if training == 0:
        yield "data.split", "nothing is left for training", "write 98,1,1"
    if run.training.eval_iters and not validation and not data.mock:
        yield (
            "training.eval_iters",
            f"data.split = {data.split} leaves nothing for validation",
            "choose 0, or data.split=98,2,0",
        )


def _check_paths(run: RunConfig) -> Iterator[Refusal]:
    data = run.data
    if data.mock and data.paths:
        yield "data.mock", "data.paths are given too", "choose one of the two"
    is_bytes = (data.tokenizer_type, data.vocab_size, data.null_tokenizer_eod_id) == ("NullTokenizer", 512, 256)
    if not (data.paths or data.mock or is_bytes):
        yield (
            "data.paths",
            "the embedded data set is bytes, the tokenizer is not",
            "name .bin/.idx prefixes, or set data.mock=true, or extend models/gpt_tiny_bytes.yaml",
        )
    for fault in filter(None, map(prefix_fault, data.paths)):
        yield "data.paths", *fault
    if isinstance(data.paths, dict) and any(weight <= 0 for weight in data.paths.values()):
        yield "data.paths", "a weight of a blend is not positive", "leave out what has weight 0"


def _check_tokenizer(run: RunConfig) -> Iterator[Refusal]:
    data = run.data
    if data.tokenizer_type == "NullTokenizer":
        if data.vocab_size is None:
            yield "data.vocab_size", "NullTokenizer does not know the size of the vocabulary", "choose 512 for bytes"
        if data.tokenizer_model is not None:
            yield (
                "data.tokenizer_model",
                "data.tokenizer_type = NullTokenizer takes ids as they are, and reads no file",
                "choose null, or name data.tokenizer_type too",
            )
        eod = data.null_tokenizer_eod_id
        if eod is not None and data.vocab_size is not None and eod >= data.vocab_size:
            yield "data.null_tokenizer_eod_id", f"outside data.vocab_size = {data.vocab_size}", "choose 256 for bytes"
    elif data.tokenizer_model is None:
        yield "data.tokenizer_model", f"{data.tokenizer_type} is read from local files", "name its file or folder"
