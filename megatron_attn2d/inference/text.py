"""Tokens to text while they come: what may be shown already, and whether a stop text has been reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

import numpy as np

from megatron_attn2d.config.schema import Data
from megatron_attn2d.data import tokenizers

_UNFINISHED = "\ufffd"
"""What bytes of an unfinished character show as."""
_ANCHORS = ("\n", "a", ".")
"""Texts, behind one of which another text is encoded as in the middle of a document."""
_BEFORE = 32
"""Tokens of a prompt that are decoded together with what follows it."""


class Tokenizer:
    """The run's tokenizer.

    Attributes:
        end: the token that ends a document.
        size: ids are smaller than this.
    """

    def __init__(self, data: Data) -> None:
        """The tokenizer of a run's `data:` section.

        Raises:
            UsageError: it only knows ids, or its files or its library aren't there.
        """
        self._tokenizer = tokenizers.load(tokenizers.from_yaml_section(data))
        self.end, self.size = self._tokenizer.eod, self._tokenizer.vocab_size
        self._before = len(self.encode(""))  # ids that it puts before every text: none, or one

    def encode(self, text: str, *, begins: bool = True) -> list[int]:
        """The ids of `text`, without the one that ends a document.

        Unless it `begins` a document, neither the id that begins one stands before it nor the space that some
        tokenizers add to a text's first word.
        """
        ids: list[int] = self._tokenizer.encode(text)[:-1].tolist()
        if begins:
            return ids
        for anchor in _ANCHORS:
            before = self.encode(anchor)
            both = self.encode(anchor + text)
            if both[: len(before)] == before:  # no token is of the anchor and of the text
                return both[len(before) :]
        return ids[self._before :]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`."""
        return self._tokenizer.decode(np.array(tokens, dtype=np.int64))


class TextStream:
    """The text of one completion, token by token: what a reader sees behind the prompt.

    Attributes:
        tokens: so far, without the prompt's.
        text: of all tokens so far, up to the stop text if there was one.
        stopped: whether a stop text has been reached.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str], prompt: Sequence[int] = ()) -> None:
        """`decode` makes text of tokens; the text ends before the first of `stop`; it follows the tokens `prompt`."""
        self._decode, self._stop = decode, stop
        self._shown = 0
        # Only the last tokens are decoded again, of which the first `_sure` are settled. All of them together, as a
        # token's text may depend on the token before it: some tokenizers put a space between two words, and none
        # before the first.
        self._window = list(prompt[-_BEFORE:])
        self._sure = len(self._window)
        self._settled = ""
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Takes a token; the text that may be shown now: no half of a character, and no beginning of a stop text."""
        self.tokens.append(token)
        self._window.append(token)
        known, whole = self._decode(self._window[: self._sure]), self._decode(self._window)
        # The new token may finish a character of the prompt, or take a space away.
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(known, whole, strict=False)))
        new = whole[alike:]
        self.text = self._settled + new
        if not whole.endswith(_UNFINISHED):
            self._settled = self.text
            self._window = self._window[self._sure :]
            self._sure = len(self._window)
        found = [place for place in (self.text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
            return self.rest()
        sure = self.text.rstrip(_UNFINISHED)
        return self._show(len(sure) - self._begun(sure))

    def rest(self) -> str:
        """What has not been shown yet."""
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        shown = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return shown

    def _begun(self, text: str) -> int:
        """Characters at the end of `text` that may become a stop text."""
        lengths = [n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return max(lengths, default=0)
