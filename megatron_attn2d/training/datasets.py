"""Builds the data sets of a run with Megatron, and verifies their files, cached indices and token ids."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_attn2d.config.prefixes import is_complete
from megatron_attn2d.data import indexed
from megatron_attn2d.errors import UsageError


def build_datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Build the training, validation and test sets, each with at least the given number of samples.

    Args:
        num_samples: of the three sets.
        vp_stage: this rank's model chunk in the interleaved schedule; None without it.

    Returns:
        the three sets; None for a set that has no samples, and on ranks that load no data.

    Raises:
        UsageError: a data set holds a token outside the vocabulary, or more documents in a sample than there are bins.
        ValueError: a data set's index, or a cached index of samples, is not the one that was built.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.parallel_state import get_tensor_model_parallel_rank
    from megatron.training import get_args
    from megatron.training.utils import is_first_or_last_pipeline_stage

    from megatron_attn2d.data.documents import most_documents
    from megatron_attn2d.data.matching import largest_id
    from megatron_attn2d.megatron import document_bins

    args = get_args()
    kind = _kind(args)
    # Upstream asks for the samples of all steps at today's batch size. A continued run whose earlier steps took larger
    # batches has consumed more, and would end early.
    rest = max(0, (args.train_iters or 0) - args.iteration) * args.global_batch_size
    num_samples = [max(num_samples[0], args.consumed_train_samples + rest), *num_samples[1:]]
    prefixes = [Path(prefix) for prefix in args.data_path or []]  # a blend's weights too, which are no files
    for prefix in prefixes:
        indexed.verify_index(prefix)
        if args.rank == 0 and is_complete(prefix):
            check_vocabulary(largest_id(prefix), str(prefix))
    indices = f"cache/{kind.__name__}_indices"  # upstream's folder beside the data
    caches = [Path(args.data_cache_path)] if args.data_cache_path else [prefix / indices for prefix in prefixes]
    config = _configuration(args)

    def is_built_here() -> bool:
        # Pipeline stages without tokens and losses need the lengths of documents too.
        used = args.document_multiple or is_first_or_last_pipeline_stage(vp_stage)
        return bool(used) and get_tensor_model_parallel_rank() == 0

    with indexed.sealed_caches(caches, verifies=os.environ.get("LOCAL_RANK", "0") == "0", seals=args.rank == 0):
        built: tuple[Any, Any, Any] = BlendedMegatronDatasetBuilder(kind, num_samples, is_built_here, config).build()
    if document_bins.asked_for(args):
        args.document_bins = document_bins.agreed(args.document_bins, most_documents(built))
    return built


def _kind(args: Any) -> Any:
    """The class of the data sets."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset

    from megatron_attn2d.data.documents import DocumentDataset, ExampleDataset

    if args.document_multiple:
        return ExampleDataset if args.examples else DocumentDataset
    return MockGPTDataset if args.mock_data else GPTDataset


def _configuration(args: Any) -> Any:
    """Megatron's configuration of the data sets, by its arguments."""
    from megatron.training import get_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    from megatron_attn2d.data.documents import DocumentDatasetConfig

    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return DocumentDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        document_multiple=args.document_multiple,
    )


def check_vocabulary(largest: int, where: str) -> None:
    """Raise UsageError if the token id `largest`, found in `where`, is outside the tokenizer's vocabulary.

    Tensor ranks would embed such a token as zeros.
    """
    from megatron.training import get_args, get_tokenizer

    if largest >= (size := get_tokenizer().vocab_size):
        raise UsageError(
            f"{where} holds token {largest}, and the vocabulary of {get_args().tokenizer_type} has {size}, from 0: "
            "train with the tokenizer that the data was made with (data.tokenizer_type, data.vocab_size)"
        )
