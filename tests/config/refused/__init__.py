"""What is refused, and in which words: `tests/guarantees/test_wrong_config.py` shows that `train` says it.

A table per subject holds overrides of `tests.config.base.BASE` and the message: whole lines, unless it ends with an
ellipsis. A new table belongs into `TABLES`.
"""

from tests.config.refused import (
    checkpoint,
    context,
    data,
    graphs,
    layers,
    machines,
    megatron_args,
    model_sizes,
    parallelism,
    spelling,
    step,
)

TABLES = (
    spelling,
    model_sizes,
    layers,
    parallelism,
    context,
    machines,
    step,
    graphs,
    data,
    checkpoint,
    megatron_args,
)
REFUSED: dict[str, str] = {}
for table in TABLES:
    assert not REFUSED.keys() & table.REFUSED.keys(), "a mistake stands in two tables"
    REFUSED |= table.REFUSED
