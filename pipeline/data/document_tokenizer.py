"""Turn texts and conversations into tokens, a block of documents at a time.

This is what the processes that tokenize (pipeline/data/tokenizer_pool.py) import, so it does not
import PyTorch, which takes three seconds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from numpy.typing import NDArray

from pipeline.data.chat import BadConversationError, ChatTokenizer, Message
from pipeline.data.packing import Document
from pipeline.data.prefix import PrefixEncoder
from pipeline.errors import (
    DecantError,
    ParamsError,
    is_library_error,
    memory_shortage,
    reason_of,
)
from pipeline.model.folder import hash_tokenizer
from pipeline.model.tokenizer import load_tokenizer

Content = str | list[Message]


@dataclass(frozen=True)
class Tokenized:
    """A document cut to the number of tokens that are kept, plus one token if it has more."""

    tokens: NDArray[np.uint32]
    in_loss: NDArray[np.bool_] | None  # None: all tokens are targets
    num_characters: int  # in the whole text
    num_kept_characters: int  # of the text, in the first `max_document_tokens` tokens
    num_kept_bytes: int  # their UTF-8 bytes

    @property
    def document(self) -> Document:
        """The document as it is packed."""
        in_loss = (
            np.ones(len(self.tokens), dtype=np.bool_) if self.in_loss is None else self.in_loss
        )
        return Document(self.tokens.astype(np.int64), in_loss)


Result = Tokenized | str | DecantError
"""A document, the reason why it is left out, or the error that stops the stage."""


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """All that a process needs to tokenize as the others do.

    Raises:
        DecantError: raised by `require_same` on a machine whose tokenizer is another one.
    """

    teacher: Path  # folder that holds the tokenizer
    sha256: str  # of the tokenizer
    version: str  # of the library tokenizers
    completions_only: bool  # put only the assistant's turns into the loss; texts are refused
    add_bos: Literal["auto"] | bool  # whether texts begin with BOS; auto: as the tokenizer does
    longest: int | None  # tokens after which the rest of a document is not tokenized
    max_document_tokens: int | None  # tokens that are kept of a document

    def require_same(self) -> None:
        """Refuse a tokenizer or a library that would give other tokens than the first process's."""
        if self.version != tokenizers.__version__:
            raise DecantError(
                f"a machine of the Ray cluster has tokenizers {tokenizers.__version__}, this one "
                f"{self.version}: install the same version on all"
            )
        if self.sha256 != hash_tokenizer(self.teacher):
            raise DecantError(
                f"a machine of the Ray cluster has another tokenizer in {self.teacher} than this "
                "one: copy the folder to all of them"
            )


class DocumentTokenizer:
    """A converter from texts and conversations to documents.

    Args:
        tokenizer: a fast Hugging Face tokenizer.

    Attributes:
        leading: ids put before each text.
        separator: the id put after each text.
    """

    def __init__(self, tokenizer: Any, settings: TokenizerSettings) -> None:
        self.tokenizer = tokenizer
        self.separator = document_separator(tokenizer)
        self.leading = leading_tokens(tokenizer, settings.add_bos)
        self._completions_only = settings.completions_only
        self._limit = None if settings.longest is None else settings.longest + 1
        self._kept = settings.max_document_tokens
        self._encode = PrefixEncoder(tokenizer, self._limit)

    def __call__(self, contents: list[Content]) -> list[Result]:
        """Tokenize a block of documents, several texts at once.

        The separator is put after each text. A conversation is rendered by its template, which
        itself writes the beginning and the end of each turn.
        """
        results: list[Result] = []
        for _, group in groupby(contents, key=lambda content: isinstance(content, str)):
            block = list(group)
            texts = [content for content in block if isinstance(content, str)]
            chats = [content for content in block if isinstance(content, list)]
            results += self._texts(texts) if texts else self._chats(chats)
        return results

    @cached_property
    def _chat(self) -> ChatTokenizer:
        return ChatTokenizer(
            self.tokenizer, completions_only=self._completions_only, limit=self._limit
        )

    def _chats(self, chats: list[list[Message]]) -> list[Result]:
        try:
            to_document = self._chat
        except DecantError as error:  # of the template
            return [error] * len(chats)
        results: list[Result] = []
        for chat in chats:
            try:
                document = to_document(chat)
                in_loss = None if document.in_loss.all() else document.in_loss
                results.append(self._tokenized(document.tokens, in_loss, characters(chat)))
            except BadConversationError as error:
                results.append(str(error))
            except BaseException as error:
                results.append(reason_to_leave_out(error))
        return results

    def _texts(self, texts: list[str]) -> list[Result]:
        if self._completions_only:
            error = ParamsError(
                f"corpus.loss_on=completions needs conversations, and the corpus holds text "
                f"({texts[0][:40]!r}...): set it to all, or name a column of messages"
            )
            return [error] * len(texts)
        try:
            encoded = self._encode.texts(texts)
        except BaseException as error:
            reason = reason_to_leave_out(error)
            if len(texts) == 1:
                return [reason]
            return [result for text in texts for result in self._texts([text])]  # all but that one
        results: list[Result] = []
        for text, (ids, is_whole) in zip(texts, encoded, strict=True):
            end = [self.separator] if is_whole else []  # a text that is cut has no end
            results.append(self._tokenized([*self.leading, *ids, *end], None, len(text)))
        return results

    def _tokenized(
        self, ids: Any, in_loss: NDArray[np.bool_] | None, num_characters: int
    ) -> Tokenized:
        tokens = np.array(ids, dtype=np.uint32)
        text = self.text_of(tokens[: self._kept])
        return Tokenized(
            tokens=tokens,
            in_loss=in_loss,
            num_characters=num_characters,
            num_kept_characters=min(len(text), num_characters),
            num_kept_bytes=len(text.encode()),
        )

    def text_of(self, tokens: NDArray[Any]) -> str:
        """Decode a document without the tokens added before and after it."""
        leading = len(self.leading)
        if leading and tokens[:leading].tolist() == self.leading:
            tokens = tokens[leading:]
        if len(tokens) and tokens[-1] == self.separator:
            tokens = tokens[:-1]
        # An array, because transformers tests each number of a list.
        return str(self.tokenizer.decode(tokens)) if len(tokens) else ""


def reason_to_leave_out(error: BaseException) -> str:
    """Return why a document cannot be tokenized; re-raise what is not the document's fault."""
    if not is_library_error(error) or isinstance(error, DecantError) or memory_shortage(error):
        raise error
    return f"the tokenizer fails on it ({reason_of(error)})"


def characters(content: Any) -> int:
    """Count the characters of a text, or of all texts in a conversation."""
    if isinstance(content, str):
        return len(content)
    if isinstance(content, dict):
        return sum(map(characters, content.values()))
    return sum(map(characters, content)) if isinstance(content, list) else 0


@lru_cache(maxsize=1)
def _loaded(settings: TokenizerSettings) -> DocumentTokenizer:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process per core, with one thread each
    settings.require_same()
    return DocumentTokenizer(load_tokenizer(settings.teacher), settings)


def tokenize_block(settings: TokenizerSettings, contents: list[Content]) -> list[Result]:
    """Tokenize a block in a process of its own, which keeps the tokenizer."""
    return _loaded(settings)(contents)


def document_separator(tokenizer: Any) -> int:
    """Return the id put after each document: <|endoftext|> if it exists, else the eos token.

    In chat models the eos token marks the end of a TURN. In pretraining, which packed text
    resembles, SmolLM2 and Qwen2.5 both separated documents by <|endoftext|>.
    """
    separator = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
    if separator is None:
        raise DecantError("the teacher's tokenizer names no end-of-text token: set its eos_token")
    return int(separator)


def leading_tokens(tokenizer: Any, add_bos: Literal["auto"] | bool) -> list[int]:
    """Return the ids that precede each text; with `auto` those that the tokenizer itself adds.

    Raises:
        ParamsError: a BOS token is requested, and the tokenizer names none.
    """
    if add_bos is False:
        return []
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if start and whole[start : start + len(plain)] == plain:
            return list(whole[:start])
    if add_bos == "auto":
        return []
    if tokenizer.bos_token_id is None:
        raise ParamsError(
            "corpus.add_bos=true asks for a token that begins each document, and the teacher's "
            "tokenizer names no bos_token: set it to auto or false"
        )
    return [int(tokenizer.bos_token_id)]
