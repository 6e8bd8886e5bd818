"""Counts the weights of a run's model."""

from dataclasses import dataclass
from math import ceil

from megatron_attn2d.config.schema import Model, RunConfig
from megatron_attn2d.data import tokenizers
from megatron_attn2d.errors import UsageError


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights: of one layer, of the embedding, of the output layer, and the number of layers."""

    layer: int
    embedding: int
    """The tables of tokens and of learned positions."""
    output: int
    """The output layer's own table; 0 where it shares the embedding's."""
    layers: int

    @property
    def total(self) -> int:
        """Weights of the whole model."""
        return self.layers * self.layer + self.embedding + self.output


def parameters(run: RunConfig) -> Parameters:
    """The numbers of weights of the model of `run`, with the vocabulary padded as by Megatron."""
    model = run.model
    hidden, ffn, bias = model.hidden_size, ffn_width(model), model.add_bias_linear
    queries, keys, head = widths(model)
    norm = 1 if model.normalization == "RMSNorm" else 2
    mlp = (ffn * 2 if model.swiglu else ffn, hidden)
    outputs = (queries + 2 * keys, hidden, *mlp)
    layer = sum(inputs * out for inputs, out in zip((hidden, queries, hidden, ffn), outputs, strict=True))
    layer += bias * sum(outputs) + 2 * norm * hidden + model.qk_layernorm * 2 * norm * head
    positions = (model.max_position_embeddings or run.training.seq_length) * hidden
    learned = model.position_embedding_type == "learned_absolute"
    table = padded_vocabulary(run) * hidden
    return Parameters(
        layer=layer,
        embedding=table + learned * positions,
        output=table if model.untie_embeddings_and_output_weights else 0,
        layers=model.num_layers,
    )


def ffn_width(model: Model) -> int:
    """Width of the MLP; where none is given, by Megatron's rule."""
    if model.ffn_hidden_size:
        return model.ffn_hidden_size
    return 4 * model.hidden_size * 2 // 3 // 64 * 64 if model.swiglu else 4 * model.hidden_size


def widths(model: Model) -> tuple[int, int, int]:
    """The widths of all query heads together, of all key heads together, and of one head."""
    head = model.kv_channels or model.hidden_size // model.num_attention_heads
    return model.num_attention_heads * head, (model.num_query_groups or model.num_attention_heads) * head, head


def padded_vocabulary(run: RunConfig) -> int:
    """The number of ids of the run's tokenizer, padded as by Megatron; 0 where it is not known."""
    multiple = 128 * run.parallelism.tensor
    return ceil((known_vocabulary(run) or 0) / multiple) * multiple


def known_vocabulary(run: RunConfig) -> int | None:
    """The number of ids of the run's tokenizer; where it can't be read on this host data.vocab_size, or None."""
    try:
        return tokenizers.vocabulary(run.data) or run.data.vocab_size
    except UsageError:  # `train` reports it
        return run.data.vocab_size
