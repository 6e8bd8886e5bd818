"""The user's text as Megatron's .bin/.idx pair: read it, tokenize it in several processes, write it, look at it.

readers.py     text, JSONL and Parquet files -> raw documents, each with its place
examples.py    fine-tuning examples -> token ids, and which of them count in a loss
tokenizers.py  text -> token ids: bytes, or one of Megatron's own tokenizers
build.py       raw documents -> PREFIX.bin, PREFIX.idx and PREFIX.json, whole or not at all
histogram.py   how long documents are, in lines and as a PNG
inspect.py     what such a data set holds
matching.py    whether it was written with the tokenizer of the run that reads it
indexed.py     the files of a data set, their checksums, and the embedded byte-level set of the quick start
docstrings.py  the embedded examples: docstrings and their functions
documents.py   Megatron's data sets of documents and of examples that are sequences of their own
order.py       what of a data set a run has trained on, where its order has changed
"""
