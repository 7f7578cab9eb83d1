"""Conversations to tokens by the teacher's own chat template, with the assistant's part marked.

A conversation is a list of messages {"role", "content", ...}. The template renders it as text, and
the text is tokenized once, so the tokens are those of `tokenizer.apply_chat_template`.

Which tokens are the assistant's is found by prefixes, since few templates say it themselves: a turn
begins where the messages before it, rendered with the generation prompt, end, and ends where the
messages up to it, rendered without, end. Each rendering must be a prefix of the next; a template
that changes what came earlier (by stripping a reasoning, by marking the last turn) is refused with
the conversation named. White space after the token that ends the turn, which no model produces, is
not part of it, and neither is a token that begins in the prompt and reaches into the turn.

What a message says can not become a command: special tokens spelled out in it ("<|im_end|>") are
tokenized as the text they are, as `sanitize_control_tokens` of newer transformers does it, and a
role, which a template may write between the brackets of such a token, must be a known one. Added
tokens that are not special, like Qwen's <tool_call>, remain tokens: messages use them on purpose.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.data.packing import Document
from pipeline.errors import DecantError, ParamsError

Message = dict[str, Any]

_ROLES = {"system", "developer", "user", "assistant", "tool", "function"}
# Noncharacters, which Unicode keeps for a program's own use: around a special token in a message.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARKS = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}|[{_OPEN}{_CLOSE}]")


class ChatTokenizer:
    """Conversations to documents.

    Args:
        tokenizer: a Hugging Face fast tokenizer with a chat template.
        completions_only: put only the assistant's turns into the loss, each with the token that
            ends it; else everything.

    Raises:
        DecantError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, *, completions_only: bool) -> None:
        if not tokenizer.chat_template:
            raise DecantError(
                "the teacher's tokenizer has no chat template, which a corpus of conversations "
                "needs: choose a teacher tuned for chat, or a column of text"
            )
        self._tokenizer = tokenizer
        self._completions_only = completions_only
        added = tokenizer.added_tokens_decoder.values()
        special = sorted((token.content for token in added if token.special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")

    def __call__(self, messages: list[Message]) -> Document:
        """Tokenize one conversation.

        Raises:
            DecantError: it is no conversation, or the template cannot render it so that the
                assistant's turns are found.
        """
        messages = [self._marked(message) for message in _checked(messages)]
        text = self._render(messages, _named(messages))
        tokens, starts = self._encode(text)
        in_loss = np.full(len(tokens), not self._completions_only)
        if self._completions_only:
            for start, stop in self._turns(messages, text):
                in_loss |= (start <= starts) & (starts < stop)
        return Document(tokens, in_loss)

    def _turns(self, messages: list[Message], text: str) -> Iterator[tuple[int, int]]:
        """Where in `text` the assistant's turns begin and end."""
        name = _named(messages)
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if not number:
                raise DecantError(
                    f"{name} opens with the assistant's turn, which no prompt precedes: give it a "
                    "user's or a system's turn first, or set corpus.loss_on=all"
                )
            before = self._render(messages[:number], name, prompt=True)
            through = self._render(messages[: number + 1], name)
            if not (through.startswith(before) and text.startswith(through)):
                raise DecantError(
                    f"{name}: the teacher's chat template renders turn {number + 1} "
                    "differently when others follow or precede it, so corpus.loss_on=completions "
                    "cannot tell which tokens are the assistant's: set it to all, or mend or drop "
                    "the conversation"
                )
            turn = through[len(before) :]
            ends = [match.end() for match in self._special.finditer(turn)]
            if ends and not turn[ends[-1] :].strip():
                turn = turn[: ends[-1]]
            yield len(before), len(before) + len(turn)

    def _render(self, messages: list[Message], name: str, *, prompt: bool = False) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt
                )
            )
        except Exception as error:  # a template is a program, and may raise anything
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DecantError(
                f"{name}: the teacher's chat template refuses it ({reason}): mend or drop it"
            ) from None

    def _encode(self, text: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Token ids of a rendered text without its marks, and where in it each token begins."""
        ids: list[int] = []
        starts: list[int] = []

        def add(piece: str, start: int, *, as_text: bool) -> None:
            encoded = self._tokenizer(
                piece,
                add_special_tokens=False,
                split_special_tokens=as_text,
                return_offsets_mapping=True,
            )
            ids.extend(encoded["input_ids"])
            starts.extend(start + first for first, _ in encoded["offset_mapping"])

        done = 0
        for match in _MARKS.finditer(text):
            add(text[done : match.start()], done, as_text=False)
            if match[1]:
                add(match[1], match.start(1), as_text=True)
            done = match.end()
        add(text[done:], done, as_text=False)
        return np.array(ids, dtype=np.int64), np.array(starts, dtype=np.int64)

    def _marked(self, value: Any) -> Any:
        """A message with marks around each special token in its strings; absent values left out."""
        if isinstance(value, str):
            return self._special.sub(rf"{_OPEN}\g<0>{_CLOSE}", _MARKS.sub(r"\1", value))
        if isinstance(value, dict):
            return {key: self._marked(item) for key, item in value.items() if item is not None}
        if isinstance(value, list):
            return [self._marked(item) for item in value]
        return value


def _checked(messages: list[Message]) -> list[Message]:
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            raise ParamsError(
                f"the corpus holds {str(message)[:80]!r} where a message with role and content was "
                "expected: name a column of messages"
            )
    for message in messages:
        if str(message["role"]) not in _ROLES:
            raise DecantError(
                f"{_named(messages)}: role {str(message['role'])[:40]!r} is none of "
                f"{', '.join(sorted(_ROLES))}: mend or drop it"
            )
    return messages


def _named(messages: list[Message]) -> str:
    """By the first turn of a user, since system turns are often all the same."""
    by_user = (message for message in messages if str(message.get("role")) == "user")
    content = str(next(by_user, messages[0]).get("content", ""))
    said = _MARKS.sub(r"\1", content)
    return f"the conversation that begins {said[:60]!r}"
