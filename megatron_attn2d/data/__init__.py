"""Reads text, tokenizes it in several processes, writes it as Megatron's .bin/.idx pair, and inspects the result.

readers.py     text, JSONL and Parquet files -> raw documents, each with its file and line
examples.py    fine-tuning examples -> token ids, and which of them count in a loss
tokenizers.py  text -> token ids: bytes, or one of Megatron's own tokenizers
tokenizing.py  raw documents -> batches of token ids, in several processes
build.py       batches of token ids -> PREFIX.bin, PREFIX.idx and PREFIX.json, whole or not at all
histogram.py   how long documents are, in lines and as a PNG
inspect.py     the numbers of a data set, and the begin of a document
matching.py    whether a data set was written with the tokenizer of the run that reads it
indexed.py     the files of a data set, their checksums, and the embedded byte-level set of the quick start
docstrings.py  the embedded examples: docstrings and their functions
documents.py   Megatron's data sets of documents and of examples that are sequences of their own
order.py       the tokens that a continued run has trained on already, where its order has changed
"""
