"""The prompts of rollouts as tokens, and which split each belongs to.

A text is cut after rollouts.prompt_tokens tokens; a conversation is rendered by the teacher's chat
template, up to where the assistant's next turn begins. Tokens are those that stages/corpus.py would
make of the same text: the BOS token where the tokenizer puts one, and special tokens spelled out in
a text or a message as plain text. It is the teacher's tokenizer, since the teacher scores rollouts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.config.source_params import RolloutsParams
from pipeline.data.chat import BadConversationError, ChatTokenizer
from pipeline.data.corpus_zarr import SPLITS, digest_of_tokens
from pipeline.data.document_tokenizer import Content, leading_tokens, reason_to_leave_out
from pipeline.data.mixture import split_of
from pipeline.data.prefix import PrefixEncoder
from pipeline.data.sources import Extent, read_documents
from pipeline.errors import DecantError, ParamsError

_SHOWN = 5


@dataclass
class RolloutPrompts:
    """Prompts that fit, without duplicates, and what was left out.

    Attributes:
        ids: tokens of each prompt.
        splits: the split of each prompt, by a hash of its tokens.
        longest: tokens that a prompt may have.
        num_read: documents that were read.
        num_duplicates: prompts left out because an earlier one has the same tokens.
        unusable: places of the documents that cannot be prompts, with the reason.
    """

    longest: int
    ids: list[list[int]] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    num_read: int = 0
    num_duplicates: int = 0
    unusable: dict[str, str] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """The sha256 of all prompts: of each the number of tokens, then the tokens."""
        total = hashlib.sha256()
        for ids in self.ids:
            total.update(_bytes([len(ids), *ids]))
        return total.hexdigest()

    def left_out(self) -> Iterator[str]:
        """Yield lines for the user about the documents that are not among the prompts."""
        if self.num_duplicates:
            yield f"{self.num_duplicates:,} prompts are left out, as others have the same tokens"
        if self.unusable:
            yield f"{len(self.unusable):,} of {self.num_read:,} documents are left out:"
        for place, reason in list(self.unusable.items())[:_SHOWN]:
            yield f"  {place}: {reason}"


def read_rollout_prompts(params: RolloutsParams, tokenizer: Any, longest: int) -> RolloutPrompts:
    """Read and tokenize the prompts of params.

    Args:
        tokenizer: the teacher's.
        longest: tokens of the longest row that the model reads and the corpus holds.

    Raises:
        DecantError: the source cannot be read, or holds no prompt that fits.
        ParamsError: all prompts belong to the same split.
    """
    found = RolloutPrompts(longest - params.max_new_tokens)
    to_ids = _PromptTokenizer(tokenizer, params.prompt_tokens)
    seen: set[bytes] = set()
    for source in read_documents(params, Extent()):
        if found.num_read == params.num_prompts:
            break
        found.num_read += 1
        fault, ids = (source.fault, []) if source.fault else to_ids(source.content)
        if fault is None and len(ids) > found.longest:
            fault = (
                f"its {len(ids):,} tokens, with max_new_tokens={params.max_new_tokens}, exceed the "
                f"{longest:,} of a row, or of the model's context"
            )
        digest = digest_of_tokens(ids)
        if fault is not None:
            found.unusable[source.place] = fault
        elif digest in seen:
            found.num_duplicates += 1
        else:
            seen.add(digest)
            found.ids.append(ids)
            found.splits.append(split_of(digest, params.validation_fraction))
    _require_both_splits(params, found)
    return found


def _require_both_splits(params: RolloutsParams, found: RolloutPrompts) -> None:
    if not found.ids:
        place, reason = next(iter(found.unusable.items()), ("", ""))
        first = f", the first, {place}: {reason}" if place else ""
        raise DecantError(
            f"none of the {found.num_read:,} documents of rollouts.source={params.source} can be a "
            f"prompt{first}: give others, or enlarge rollouts.row_length"
        )
    if len(splits := set(found.splits)) < len(SPLITS):
        raise ParamsError(
            f"rollouts.validation_fraction={params.validation_fraction:g} puts all of the "
            f"{len(found.ids)} prompts into {splits.pop()}, and training needs both splits: give "
            "more prompts, or change it"
        )


class _PromptTokenizer:
    def __init__(self, tokenizer: Any, prompt_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._prompt_tokens = prompt_tokens
        self._leading = leading_tokens(tokenizer, "auto")
        self._encode = PrefixEncoder(tokenizer, prompt_tokens)

    @cached_property
    def _chat(self) -> ChatTokenizer:
        return ChatTokenizer(self._tokenizer, completions_only=False)

    def __call__(self, content: Content) -> tuple[str | None, list[int]]:
        """Return why a document cannot be a prompt, or None, and its tokens."""
        try:
            if isinstance(content, str):
                [(ids, _)] = self._encode.texts([content])
                ids = [*self._leading, *ids][: self._prompt_tokens]
            else:
                ids = self._chat.prompt(content).tolist()
        except BadConversationError as error:
            return str(error), []
        except BaseException as error:
            return reason_to_leave_out(error), []
        return (None, ids) if ids else ("it has no tokens", [])


def _bytes(ids: Sequence[int]) -> bytes:
    return np.array(ids, dtype="<u4").tobytes()
