"""Texts that end at a string: found token by token, so that nothing is generated behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.generation import ENDED, GenerationSettings, decode_steps
from pipeline.text_generator import TextGenerator

_CONTEXT = 4
"""Tokens that others are decoded behind: some tokenizers drop a space at the beginning."""


class StopStrings:
    """Keeps the tokens of a batch, and says whose text a step has ended: `decode_steps`' `ends`.

    Args:
        tokenizer: of the model.
        prompts: token ids of each row.
        stop: strings, none empty.

    Attributes:
        tokens: ids generated so far, of each row.
    """

    def __init__(self, tokenizer: Any, prompts: Sequence[list[int]], stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._before = [prompt[-_CONTEXT:] for prompt in prompts]
        # A token holds a byte at least, so that so many of the last hold a string that just ended.
        self._window = max((len(text.encode()) for text in stop), default=0) + 1
        self.tokens: list[list[int]] = [[] for _ in prompts]

    def __call__(self, step: Tensor) -> Tensor:
        """Take a step's tokens, int64 [B]; bool [B], True where a text now holds a stop string."""
        ended = torch.zeros(len(step), dtype=torch.bool)
        for row, token in enumerate(step.tolist()):
            if token != ENDED:
                self.tokens[row].append(token)
                ended[row] = any(stop in self._text(row, self._window) for stop in self._stop)
        return ended

    def text(self, row: int) -> str:
        """What a row says, up to its first stop string."""
        text = self._text(row, len(self.tokens[row]))
        return text[: min((text.find(stop) for stop in self._stop if stop in text), default=None)]

    def _text(self, row: int, last: int) -> str:
        """The text of the last so many new tokens."""
        everything = [*self._before[row], *self.tokens[row]]
        middle = max(len(self._before[row]), len(everything) - last)
        start = max(0, middle - _CONTEXT)
        before = self._decode(everything[start:middle])
        return self._decode(everything[start:])[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def complete(
    generator: TextGenerator,
    prompts: Sequence[list[int]],
    settings: GenerationSettings,
    stop: Sequence[str],
) -> list[tuple[str, int]]:
    """One batch of encoded prompts; each continuation up to its first stop string.

    A row that has ended leaves the batch. Returns text and number of tokens generated, those of the
    stop string and of what came with it included.
    """
    ends = StopStrings(generator.tokenizer, prompts, stop)
    for _ in decode_steps(generator.student, prompts, generator.fill(settings), ends=ends):
        pass
    return [(ends.text(row), len(ids)) for row, ids in enumerate(ends.tokens)]
