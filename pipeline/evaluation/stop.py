"""Texts that end at a stop string, found token by token, so that nothing is generated after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.generation.sampling import ENDED, GenerationSettings, decode_steps
from pipeline.generation.text_generator import TextGenerator

_CONTEXT = 4
"""Number of tokens decoded before the others, because some tokenizers drop an initial space."""


class StopStrings:
    """The tokens of a batch, and which texts a step has ended; it is the `ends` of `decode_steps`.

    Args:
        tokenizer: the model's tokenizer.
        prompts: token ids of each row.
        stop: non-empty strings.

    Attributes:
        tokens: ids generated so far, per row.
    """

    def __init__(self, tokenizer: Any, prompts: Sequence[list[int]], stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._before = [prompt[-_CONTEXT:] for prompt in prompts]
        # A token holds at least one byte, so this many last tokens cover a stop string just ended.
        self._window = max((len(text.encode()) for text in stop), default=0) + 1
        self.tokens: list[list[int]] = [[] for _ in prompts]

    def __call__(self, step: Tensor) -> Tensor:
        """Take a step's tokens, int64 [B]; return bool [B], True where a text has a stop string."""
        ended = torch.zeros(len(step), dtype=torch.bool)
        for row, token in enumerate(step.tolist()):
            if token != ENDED:
                self.tokens[row].append(token)
                ended[row] = any(stop in self._text(row, self._window) for stop in self._stop)
        return ended

    def text(self, row: int) -> str:
        """Return the text of a row, up to its first stop string."""
        text = self._text(row, len(self.tokens[row]))
        return text[: min((text.find(stop) for stop in self._stop if stop in text), default=None)]

    def _text(self, row: int, last: int) -> str:
        """Return the text of the last `last` new tokens."""
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
    """Complete one batch of encoded prompts, each up to its first stop string.

    A row that has ended leaves the batch. Return each text with the number of tokens generated,
    including those of the stop string and of any text that came with it.
    """
    ends = StopStrings(generator.tokenizer, prompts, stop)
    for _ in decode_steps(generator.student, prompts, generator.fill(settings), ends=ends):
        pass
    return [(ends.text(row), len(ids)) for row, ids in enumerate(ends.tokens)]
