"""What is supported: the configurations that Transformer Engine tests its context parallelism with, and what becomes of
each here. `test_support` runs them; `scripts/supported.py` prints them as the table of docs/supported.md.
"""

from __future__ import annotations

from dataclasses import dataclass

TOKENS = 4096
"""Tokens of a sequence in that matrix; windows are scaled by it when they are tested on fewer."""


@dataclass(frozen=True)
class Case:
    """One kind of attention.

    Attributes:
        names: Transformer Engine's configurations of this kind.
        heads: of queries, and of keys and values.
        dims: of queries and keys, and of values.
        causal, window: the mask, in tokens.
        softmax: "vanilla", "off-by-one" or "learnable", as Megatron names its sinks.
        refused: what is refused, and what would serve; nothing where it works.
    """

    names: str
    heads: tuple[int, int]
    dims: tuple[int, int]
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softmax: str = "vanilla"
    refused: str = ""

    def scaled_window(self, tokens: int) -> tuple[int, int]:
        """The window on a sequence of so many tokens."""
        left, right = (side if side <= 0 else max(1, side * tokens // TOKENS) for side in self.window)
        return left, right

    @property
    def title(self) -> str:
        """Heads, mask and softmax in words."""
        h, g = self.heads
        d, dv = self.dims
        kind = "MHA" if h == g else "GQA"
        parts = [f"{kind} {h}x{d}" if h == g else f"{kind} {h}/{g} x{d}"]
        if d != dv:
            parts = [f"MLA {h}x{d}, values {dv}"]
        parts.append("causal" if self.causal else "bidirectional")
        if self.window != (-1, -1):
            parts.append(f"window {self.window}")
        if self.softmax != "vanilla":
            parts.append(f"{self.softmax} sink")
        return ", ".join(parts)


_BIAS = "attention bias is not supported: choose rotary or learned positions"
CASES = (
    Case("flash, fused cp_1_0", (12, 12), (128, 128)),
    Case("flash, fused cp_1_1", (12, 12), (128, 128), causal=False),
    Case("flash cp_1_2", (12, 12), (128, 128), window=(512, 0)),
    Case("flash cp_1_3", (12, 12), (128, 128), causal=False, window=(512, 512)),
    Case("fused cp_1_5", (12, 12), (128, 128), window=(512, 512)),
    Case("flash, fused cp_2_0", (32, 4), (128, 128)),
    Case("flash cp_2_1", (12, 2), (128, 128), causal=False),
    Case("flash cp_2_2", (32, 4), (128, 128), window=(128, 0)),
    Case("flash cp_2_3", (12, 2), (128, 128), causal=False, window=(512, 512)),
    Case("fused cp_2_1", (32, 32), (128, 128), window=(128, 0)),
    Case("fused cp_2_6", (12, 2), (128, 128), window=(512, 512)),
    Case("flash cp_3_0, fused cp_3_1", (128, 128), (192, 128)),
    Case("flash cp_3_1", (12, 12), (192, 128), causal=False),
    Case("flash cp_3_2", (12, 12), (192, 128), window=(512, 0)),
    Case("flash cp_3_3", (12, 12), (192, 128), causal=False, window=(512, 512)),
    Case("fused cp_3_0", (12, 12), (128, 64)),
    Case("fused cp_4_0", (64, 8), (64, 64)),
    Case("fused cp_4_1", (64, 8), (64, 64), softmax="off-by-one"),
    Case("fused cp_4_2", (64, 8), (64, 64), softmax="learnable"),
    Case("fused cp_4_3", (64, 64), (64, 64), window=(128, 0), softmax="learnable"),
    Case("cp_d256_causal", (16, 16), (256, 256)),
    Case("cp_d256_causal_swa", (16, 16), (256, 256), window=(512, 0)),  # 128 of 1024 tokens
    Case("fused cp_1_2 to 1_4, 2_2 to 2_5, 3_2 to 3_4", (12, 12), (128, 128), refused=_BIAS),
)


def table() -> str:
    """The table in Markdown."""
    lines = ["| Attention | Transformer Engine's name | sbhd and thd, every grid and the ring |", "| --- | --- | --- |"]
    for case in CASES:
        title = "with attention bias" if case.refused else case.title
        lines.append(f"| {title} | {case.names} | {f'refused: {case.refused}' if case.refused else 'works'} |")
    return "\n".join(lines)
