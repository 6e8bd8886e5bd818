"""The table of benchmark_decode.py, in Markdown."""

from __future__ import annotations

COLUMNS = (
    ("cache GiB", "cache_gib", ".3f"),
    ("attention ms", "attention_ms", ".3f"),
    ("bound ms", "attention_bound_ms", ".3f"),
    ("ratio", "attention_ratio", ".2f"),
    ("step ms", "step_ms", ".3f"),
    ("bound ms", "step_bound_ms", ".3f"),
    ("ratio", "step_ratio", ".2f"),
    ("plain ms", "plain_ms", ".3f"),
    ("tokens/s", "tokens_per_s", ".1f"),
    ("peak GiB", "peak_gib", ".2f"),
    ("plan GiB", "plan_gib", ".2f"),
)
"""Of the table: heading, key of the row, format."""


def heading() -> str:
    """Its first two lines."""
    names = [name.rjust(8) for name, _, _ in COLUMNS]
    return table_line(["tokens".rjust(9), *names]) + "\n|" + " --- |" * (1 + len(names))


def line(row: dict[str, float]) -> str:
    """A row of the table."""
    begin = f"{row['tokens']:9,.0f}"
    if "needs_gib" in row:
        return table_line([begin, f"does not fit: {row['needs_gib']:.1f} GiB of keys and values per rank"])
    cells = (format(row[key], spelled).rjust(max(8, len(heading))) for heading, key, spelled in COLUMNS)
    return table_line([begin, *cells])


def table_line(cells: list[str]) -> str:
    """Of a Markdown table."""
    return f"| {' | '.join(cells)} |"
