"""Data sets, tokenizers and documents."""

REFUSED = {
    # sets and tokenizers
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
    "data.document_bins=8": (
        "data.document_bins = 8: data.document_masking is false; choose null, or document_masking=true"
    ),
    "data.document_masking=true data.document_bins=8 megatron_args.multi_latent_attention=true": (
        "data.document_bins = 8: megatron_args.multi_latent_attention rotates by the positions of the whole sample ..."
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
    "data.document_masking=true megatron_args={num_experts: 4, moe_router_load_balancing_type: [sinkhorn]}": (
        "megatron_args.moe_router_load_balancing_type = ['sinkhorn']: it would balance the padding of "
        "data.document_masking too; choose aux_loss"
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
}
