"""Find the first tokens of a long text without tokenizing the rest of it.

A text is cut between a letter or digit and the white space or punctuation after it, at a position
that no entry of the vocabulary spans. This changes none of the tokens before the cut. BPE only
merges pieces that end up in one entry, so no merge crosses the position, and Unigram's best
segmentation consists of entries, so it has a border there; both sides are tokenized as if alone.
The pre-tokenizer does not need more than the text up to the cut either: it splits from left to
right, and its expressions look ahead only to see whether a run of letters or of digits continues,
which the character after the run decides. (White space is different: the text after a run of it
decides how the run is split, so no cut touches the end of a run.) Texts are tokenized whole if the
model is neither BPE nor Unigram, if it marks the ends of words, or if the tokenizer is not a fast
one.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from tokenizers.models import BPE, Unigram
from tokenizers.pre_tokenizers import ByteLevel

_CHARACTERS_PER_TOKEN = 8  # the first try; then twice as many; code and English have 3 to 5
_BORDER = re.compile(r"[^\W_](?=[ \n\t]|[^\w\s])")


@dataclass(frozen=True)
class Encoded:
    """Ids, their start and end offsets in the text, and whether they are all ids of the text."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    is_whole: bool


class PrefixEncoder:
    """An encoder for the first tokens of a text, equal to those that the whole text would give.

    Args:
        tokenizer: a Hugging Face tokenizer.
        limit: maximum number of tokens; None for all.
    """

    def __init__(self, tokenizer: Any, limit: int | None) -> None:
        self._tokenizer = tokenizer
        self.limit = limit
        self._safe: dict[str, bool] = {}

    def head(self, text: str) -> str:
        """Return the part of a text that usually holds enough tokens, or the whole text."""
        if self.limit is None:
            return text
        return text[: self._cut(text, _CHARACTERS_PER_TOKEN * self.limit)]

    def texts(self, texts: list[str]) -> list[tuple[list[int], bool]]:
        """Tokenize several texts at once; return each one's ids, and whether they are all it has.

        Special tokens spelled out in a text are tokenized as text.
        """
        heads = [self.head(text) for text in texts]
        encoded = self._tokenizer(heads, add_special_tokens=False, split_special_tokens=True)
        found = []
        for text, head, ids in zip(texts, heads, encoded["input_ids"], strict=True):
            if len(head) < len(text) and len(ids) < (self.limit or 0):
                rest = self(text, self.limit, as_text=True, start=2 * len(head))
                found.append((rest.ids, rest.is_whole))
            else:
                found.append((ids[: self.limit], len(head) == len(text) and not self._over(ids)))
        return found

    def __call__(
        self, text: str, limit: int | None, *, as_text: bool, start: int | None = None
    ) -> Encoded:
        """Return the first `limit` tokens of one text.

        Args:
            as_text: tokenize special tokens spelled out in the text as text.
            start: number of characters to try first.
        """
        end = (
            len(text) if limit is None else self._cut(text, start or _CHARACTERS_PER_TOKEN * limit)
        )
        while True:
            encoded = self._tokenizer(
                text[:end],
                add_special_tokens=False,
                split_special_tokens=as_text,
                return_offsets_mapping=True,
            )
            ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
            if end == len(text) or (limit is not None and len(ids) >= limit):
                is_whole = end == len(text) and (limit is None or len(ids) <= limit)
                return Encoded(ids[:limit], offsets[:limit], is_whole)
            end = self._cut(text, 2 * end)

    def _over(self, ids: list[int]) -> bool:
        return self.limit is not None and len(ids) > self.limit

    def _cut(self, text: str, start: int) -> int:
        """Return the first position from `start` on where the text may be cut, or its length."""
        if start < len(text) and self._pairs is not None:
            for match in _BORDER.finditer(text, start):
                pair = text[match.start() : match.start() + 2]
                if pair not in self._safe:
                    self._safe[pair] = self._is_border(pair)
                if self._safe[pair]:
                    return match.end()
        return len(text)

    @cached_property
    def _pairs(self) -> frozenset[tuple[str, str]] | None:
        """Adjacent characters in entries of the vocabulary; None if texts may not be cut at all."""
        if not getattr(self._tokenizer, "is_fast", False):
            return None
        model = self._tokenizer.backend_tokenizer.model
        if isinstance(model, BPE):
            if model.end_of_word_suffix or model.continuing_subword_prefix:
                return None
        elif not isinstance(model, Unigram):
            return None
        pairs: set[tuple[str, str]] = set()
        for entry in self._tokenizer.get_vocab():
            pairs.update(pairwise(entry))
        return frozenset(pairs)

    def _is_border(self, pair: str) -> bool:
        """Return whether no entry holds the two characters adjacently, however it spells them."""
        normalizer = self._tokenizer.backend_tokenizer.normalizer
        written = normalizer.normalize_str("a" + pair) if normalizer else pair
        first, second = written[-2:-1], written[-1:]
        if not first or second not in (pair[1], {" ": "▁"}.get(pair[1])):
            return False
        if unicodedata.combining(pair[1]):
            return False
        in_bytes = [_in_bytes(character) for character in (first, pair[1])]
        neighbours = [
            (first, second),
            (first, pair[1]),
            (first, "▁" if pair[1] == " " else pair[1]),
            (in_bytes[0][-1], in_bytes[1][0]),
        ]
        assert self._pairs is not None
        return not self._pairs.intersection(neighbours)


_BYTE_LEVEL = ByteLevel(add_prefix_space=False, use_regex=False)


def _in_bytes(character: str) -> str:
    """Spell a character as a byte-level vocabulary does, with one letter for each byte."""
    return "".join(piece for piece, _ in _BYTE_LEVEL.pre_tokenize_str(character))
