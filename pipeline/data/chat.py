"""Turn conversations into tokens by the teacher's chat template, and mark the assistant's tokens.

A conversation is a list of messages {"role", "content", ...}. The template renders it as text, and
the text is tokenized once, so the tokens are those of `tokenizer.apply_chat_template`. Content may
be a text or a list of text parts, and the arguments of a tool call may be an object or its JSON.
The template gets the form that it reads, which is found by rendering a test message.
`strftime_now`, with which templates write today's date, always gives the same day, so that a corpus
does not change from one day to the next.

If the template encloses the assistant's tokens in {% generation %}, those are used; they are the
tokens of transformers' `return_assistant_tokens_mask`. Few templates do so. With the others, a turn
begins where the prompt to generate it ends. If the messages before the turn, rendered with the
generation prompt, are a prefix of the text, the turn begins at the end of that prefix. They are not
if the template writes earlier turns differently once others follow (Qwen3 strips their reasoning,
gpt-oss ends them with another token). The two renderings are then compared from a position in the
message before the turn on. A probe, a character that no text contains, marks that position; it
counts only if the rendering is otherwise unchanged. A prompt may open a reasoning block that the
turn does not have (DeepSeek-V3, Nemotron 3). Such a prompt ends where the two renderings diverge,
or where the prompt without thinking (`enable_thinking=False`) ends.

A turn ends with the token that stops generation. It is found in the same way, from a probe within
the turn on: the text after the probe is the same whether the turn is the last or not, up to the
next message. The turn does not include text that a template puts only at the end of a conversation
(Phi-3's <|endoftext|>), white space after the last token, which no model produces, or a token that
lies partly in the turn and partly before or after it. A conversation in which turns cannot be told
apart in this way is refused, and the message names it.

The content of a message cannot become a command. Special tokens spelled out in it ("<|im_end|>")
are tokenized as plain text, as `sanitize_control_tokens` of newer transformers does, and a role,
which a template may write between the brackets of such a token, must be a known one. Added tokens
that are not special, such as Qwen's <tool_call>, remain tokens: messages use them on purpose.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data import chat_template
from pipeline.data.chat_template import RenderTimeout, marks_turns, time_limit, with_fixed_date
from pipeline.data.packing import Document
from pipeline.data.prefix import PrefixEncoder
from pipeline.errors import DecantError, reason_of

Message = dict[str, Any]
Span = tuple[int, int]


_ROLES = {"system", "developer", "user", "assistant", "tool", "function"}
_TEXT_PARTS = {"text", "input_text", "output_text"}
# Noncharacters, which Unicode reserves for internal use: two that enclose special tokens in a
# message, and the probe.
_OPEN, _CLOSE, _PROBE = "\ufdd0", "\ufdd1", "\ufdd2"
_MARKS = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}|[{_OPEN}{_CLOSE}{_PROBE}]")


class BadConversationError(DecantError):
    """One conversation cannot be used; others may be."""


class ChatTokenizer:
    """A converter from conversations to documents.

    Args:
        tokenizer: a Hugging Face fast tokenizer with a chat template.
        completions_only: put only the assistant's turns into the loss, each with the token that
            ends it; otherwise everything is in the loss.
        limit: keep at most this many tokens; None keeps all.

    Raises:
        DecantError: the tokenizer has no chat template, or its template does not terminate.
    """

    def __init__(self, tokenizer: Any, *, completions_only: bool, limit: int | None = None) -> None:
        if not tokenizer.chat_template:
            raise DecantError(
                "the teacher's tokenizer has no chat template, which a corpus of conversations "
                "needs: choose a teacher tuned for chat, or a column of text"
            )
        self._tokenizer = tokenizer
        self._encode = PrefixEncoder(tokenizer, limit)
        self._completions_only = completions_only
        self._template = with_fixed_date(tokenizer.get_chat_template())
        self.marks_turns = marks_turns(self._template)
        added = tokenizer.added_tokens_decoder.values()
        self._special = _any_of(token.content for token in added if token.special)
        self._added = _any_of((token.content for token in added), "</?[a-z_]+>")
        self._reads_parts = cache(self._try_parts)
        try:
            self._render([{"role": "user", "content": "probe"}])
        except _TooSlowError:
            raise DecantError(
                "the teacher's chat template has not rendered one short message within "
                f"{chat_template.RENDER_SECONDS:g} s: correct it (it may loop), or choose "
                "another teacher"
            ) from None
        except BadConversationError:
            pass  # the error of a real conversation will say what is missing

    def __call__(self, messages: list[Message]) -> Document:
        """Tokenize one conversation.

        Raises:
            BadConversationError: it is not a conversation, or the assistant's turns cannot be
                found in the template's rendering.
        """
        messages = self._prepared(messages)
        if self._completions_only and self.marks_turns:
            text, spans = self._render_with_turns(messages)
        else:
            text, spans = self._render(messages), []
        tokens, starts, stops = self._tokens(text)
        in_loss = np.full(len(tokens), not self._completions_only)
        if self._completions_only and self.marks_turns:
            for start, stop in spans:  # as in transformers: every token that overlaps the turn
                in_loss |= (starts < stop) & (stops > start)
        elif self._completions_only:
            for start, stop in self._turns(messages, text):
                in_loss |= (start <= starts) & (stops <= stop) & (starts < stop)
        return Document(tokens, in_loss)

    def prompt(self, messages: list[Message]) -> NDArray[np.int64]:
        """Tokenize a conversation up to where the assistant's next turn begins.

        The assistant's turns at its end are left out: they answer the prompt.

        Raises:
            BadConversationError: it is not a conversation, or has only the assistant's turns.
        """
        before = self._prepared(messages)
        while before and before[-1]["role"] == "assistant":
            before.pop()
        if not before:
            raise BadConversationError(
                f"{_named(messages)} has only the assistant's turns, so there is no prompt: give "
                "it a user's turn, or drop it"
            )
        return self._tokens(self._render(before, prompt=True))[0]

    # Rendering.

    def _prepared(self, messages: list[Message]) -> list[Message]:
        """Check messages, give them the template's form, and mark their special tokens."""
        formed = [self._formed(message) for message in _checked(messages)]
        return [self._marked(message) for message in formed]

    def _render(self, messages: list[Message], *, prompt: bool = False, **options: Any) -> str:
        return str(
            self._guarded(
                messages,
                lambda: self._tokenizer.apply_chat_template(
                    messages,
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **options,
                ),
            )
        )

    def _render_with_turns(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """Return the text, and the spans that the template encloses in {% generation %}."""
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = self._guarded(
            messages,
            lambda: render_jinja_template(
                [messages],
                chat_template=self._template,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            ),
        )
        return texts[0], spans[0]

    def _guarded(self, messages: list[Message], render: Callable[[], Any]) -> Any:
        try:
            with time_limit(chat_template.RENDER_SECONDS):
                return render()
        except RenderTimeout:
            raise _TooSlowError(
                f"{_named(messages)}: the teacher's chat template has not rendered it within "
                f"{chat_template.RENDER_SECONDS:g} s: shorten or drop it"
            ) from None
        except Exception as error:  # a template is a program, and may raise anything
            reason = reason_of(error)
            raise BadConversationError(
                f"{_named(messages)}: the teacher's chat template refuses it ({reason}): correct "
                "or drop it"
            ) from None

    # The form of a message that the template reads.

    def _formed(self, message: Message) -> Message:
        """Drop null values from a message; put content and arguments in the template's form."""
        message = {key: value for key, value in message.items() if value is not None}
        content = message.get("content", "")
        if isinstance(content, list):
            texts = [_text_of(part, message) for part in content]
            if self._needs_parts or self._reads_parts(message["role"]):
                message["content"] = [{"type": "text", "text": text} for text in texts]
            else:
                message["content"] = "".join(texts)
        elif not isinstance(content, str):
            raise BadConversationError(
                f"a message of {message['role']} has the content {str(content)[:60]!r}, neither "
                "text nor a list of text parts: correct or drop it"
            )
        elif self._needs_parts and "content" in message:
            message["content"] = [{"type": "text", "text": content}]
        if calls := message.get("tool_calls"):
            if self._omits_calls:
                raise BadConversationError(
                    "the teacher's chat template leaves tool calls out, and a message of "
                    f"{message['role']} makes one: drop the conversation, or choose another teacher"
                )
            calls = _parsed(calls) if isinstance(calls, str) else calls
            if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
                raise BadConversationError(
                    f"a message of {message['role']} has the tool calls {str(calls)[:60]!r}, which "
                    "are not a list of objects: correct or drop it"
                )
            message["tool_calls"] = [self._formed_call(call) for call in calls]
        return message

    def _formed_call(self, call: dict[str, Any]) -> dict[str, Any]:
        call = {key: value for key, value in call.items() if value is not None}
        if isinstance(call.get("function"), dict):
            call["function"] = self._formed_call(call["function"])
        if "arguments" in call:
            call["arguments"] = self._formed_arguments(call["arguments"])
        return call

    def _formed_arguments(self, arguments: Any) -> Any:
        if self._reads_arguments_as_text:
            is_text = isinstance(arguments, str)
            return arguments if is_text else json.dumps(arguments, ensure_ascii=False)
        if isinstance(arguments, str):
            arguments = _parsed(arguments) if arguments.strip() else {}
        if not isinstance(arguments, dict):
            raise BadConversationError(
                f"a tool call has the arguments {str(arguments)[:60]!r}, which are no JSON object: "
                "correct or drop it"
            )
        return arguments

    @cached_property
    def _needs_parts(self) -> bool:
        """Whether the template drops content given as text but not content given as parts."""
        message = {"role": "user", "content": "probe"}
        parts = {"role": "user", "content": [{"type": "text", "text": "probe"}]}
        return not self._shows(message, "probe") and bool(self._shows(parts, "probe"))

    def _try_parts(self, role: str) -> bool:
        """Return whether the template renders text parts in this role's messages like a text."""
        user = {"role": "user", "content": "ask"}
        before = {
            "system": [],
            "developer": [],
            "user": [],
            "assistant": [user],
        }.get(role, [user, _call_of({"key": "value"})])
        after = [user] if role in ("system", "developer") else []
        words = ["first", "second"]
        forms: list[Any] = ["".join(words), [{"type": "text", "text": word} for word in words]]
        try:
            as_text, as_parts = (
                self._render([*before, {"role": role, "content": form}, *after]) for form in forms
            )
        except BadConversationError:
            return False
        return as_text == as_parts and "firstsecond" in as_parts

    @cached_property
    def _omits_calls(self) -> bool:
        """Whether the template renders a call without error, but omits its name and arguments."""
        user = {"role": "user", "content": "ask"}
        call = _call_of({"key": "value"})
        return [self._shows(call, words, user) for words in ("look", "value")] == [False, False]

    @cached_property
    def _reads_arguments_as_text(self) -> bool:
        """Whether arguments given as an object are refused, or written as Python, not as JSON."""
        user = {"role": "user", "content": "ask"}
        as_object, as_text = (
            self._shows(_call_of(arguments), "value", user, without="{'key'")
            for arguments in ({"key": "value"}, '{"key": "value"}')
        )
        return not as_object and bool(as_text)

    def _shows(
        self, message: Message, words: str, *before: Message, without: str = "\0"
    ) -> bool | None:
        """Return whether a message's rendering contains the words; None if it fails to render."""
        try:
            text = self._render([*before, message])
        except BadConversationError:
            return None
        return words in text and without not in text

    def _marked(self, value: Any) -> Any:
        """Put marks around each special token in the strings of a message."""
        if isinstance(value, str):
            return self._special.sub(rf"{_OPEN}\g<0>{_CLOSE}", _MARKS.sub(r"\1", value))
        if isinstance(value, dict):
            return {self._marked(key): self._marked(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._marked(item) for item in value]
        return value

    def _tokens(self, text: str) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[Any]]:
        """Tokenize a rendered text without its marks; return ids with start and end offsets."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []

        def add(piece: str, start: int, *, as_text: bool) -> None:
            limit = None if self._encode.limit is None else self._encode.limit - len(ids)
            if piece and (limit is None or limit > 0):
                encoded = self._encode(piece, limit, as_text=as_text)
                ids.extend(encoded.ids)
                offsets.extend((start + first, start + last) for first, last in encoded.offsets)

        done = 0
        for match in _MARKS.finditer(text):
            add(text[done : match.start()], done, as_text=False)
            add(match[1] or "", match.start(1), as_text=True)
            done = match.end()
        add(text[done:], done, as_text=False)
        edges = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        return np.array(ids, dtype=np.int64), edges[:, 0], edges[:, 1]

    # The assistant's turns in the rendering of a template that does not mark them.

    def _turns(self, messages: list[Message], text: str) -> Iterator[Span]:
        """Yield the start and end of each of the assistant's turns in `text`."""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if not number:
                raise BadConversationError(
                    f"{_named(messages)} opens with the assistant's turn, which no prompt "
                    "precedes: give it a user's or a system's turn first, or set corpus.loss_on=all"
                )
            start = self._start(messages, number, text)
            stop = None if start is None else self._stop(messages, number, text, start)
            if start is None or stop is None or stop < start:
                raise BadConversationError(
                    f"{_named(messages)}: the teacher's chat template renders turn {number + 1} "
                    "differently when others follow or precede it, so corpus.loss_on=completions "
                    "cannot tell which tokens are the assistant's: set it to all, or correct or "
                    "drop the conversation"
                )
            yield start, stop

    def _start(self, messages: list[Message], number: int, text: str) -> int | None:
        """Return where the prompt to generate message `number` ends; None if it is not found."""
        prompt = self._render(messages[:number], prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        for place in range(number - 1, -1, -1):
            for probed, rendered in self._probed(messages, place, text):
                prompt = self._render(probed[:number], prompt=True)
                if not (count := prompt.count(_PROBE)):
                    continue
                prompt, tail = _after(prompt, count), _after(rendered, count)
                begins = len(text) - len(tail)
                if tail.startswith(prompt):
                    return begins + len(prompt)
                if length := self._other_prompt(prompt, tail, probed[:number]):
                    return begins + length
                # The turn's own words may begin like the rest of the prompt.
                own = self._probed(messages, number, text, at_start=True)
                own_words = [shown.index(_PROBE) for _, shown in own]
                shared = self._shared(prompt, tail)
                if own_words and shared > self._without_prompt(prompt, probed[:number]):
                    return min([begins + shared, *own_words])
        return None

    def _other_prompt(self, prompt: str, tail: str, before: list[Message]) -> int:
        """Return the length of the prompt, with or without thinking, that begins `tail`, else 0."""
        lengths = []
        for thinking in (False, True):
            other = self._render(before, prompt=True, enable_thinking=thinking)
            other = _after(other, other.count(_PROBE))
            if tail.startswith(other) and len(other) > self._without_prompt(prompt, before):
                lengths.append(len(other))
        return max(lengths, default=0)

    def _without_prompt(self, prompt: str, before: list[Message]) -> int:
        """Return how much of the prompt belongs to the end of the message before it."""
        ended = self._render(before)
        return self._shared(prompt, _after(ended, ended.count(_PROBE)))

    def _stop(self, messages: list[Message], number: int, text: str, start: int) -> int | None:
        """Return the end of message `number`, its stop token included; None if it is not found.

        The message begins at `start`.
        """
        is_last = number == len(messages) - 1
        through = text if is_last else self._render(messages[: number + 1])
        turn = through[start:]
        if text.startswith(through) and not (is_last and self._is_closed_twice(turn)):
            return start + self._closed(turn)
        end = {"role": "user", "content": "ask"}
        for probed, rendered in self._probed(messages, number, text):
            try:
                other = self._render([*probed, end] if is_last else probed[: number + 1])
            except BadConversationError:
                continue
            if _PROBE not in other:
                continue
            tail, other = _after(rendered, 1), _after(other, 1)
            begins = len(text) - len(tail)
            shared = tail[: self._shared(tail, other)]
            if ends := [match.end() for match in self._ends(shared)]:
                return begins + ends[-1]
            if next(self._ends(other), None) is None:
                if not is_last:
                    return begins + len(shared)  # no token ends a turn
                continue
            first = next(self._ends(tail), None)  # not the token that ends the last turn
            if "tool_calls" not in messages[number] and first and not tail[: first.start()].strip():
                return begins + first.end()
        return start + self._closed(turn) if is_last else None

    def _ends(self, text: str) -> Iterator[re.Match[str]]:
        """Return the special tokens that the template itself has written."""
        return (
            match
            for match in self._special.finditer(text)
            if text[max(match.start() - 1, 0) : match.start()] != _OPEN
        )

    def _closed(self, turn: str) -> int:
        """Return the length of a turn without white space after the special token that ends it."""
        ends = [match.end() for match in self._ends(turn)]
        return ends[-1] if ends and not turn[ends[-1] :].strip() else len(turn)

    def _is_closed_twice(self, turn: str) -> bool:
        """Return whether at least two special tokens, and otherwise white space, end a turn."""
        ends = list(self._ends(turn))[-2:]
        if len(ends) < 2:
            return False
        first, second = ends
        return not (turn[first.end() : second.start()] + turn[second.end() :]).strip()

    def _probed(
        self, messages: list[Message], number: int, text: str, *, at_start: bool = False
    ) -> Iterator[tuple[list[Message], str]]:
        """Yield the conversation with a probe in message `number`, and its rendering.

        Without the probe the rendering equals `text`.
        """
        for changed in _with_probe(messages[number], at_start=at_start):
            probed = [*messages[:number], changed, *messages[number + 1 :]]
            try:
                rendered = self._render(probed)
            except _TooSlowError:
                raise
            except BadConversationError:
                continue
            if _PROBE in rendered and rendered.replace(_PROBE, "") == text:
                yield probed, rendered

    def _shared(self, one: str, other: str) -> int:
        """Return the length of the common prefix of two texts that splits no token or tag."""
        equal = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
        length = sum(1 for _ in equal)
        cuts = [
            match.start()
            for text in (one, other)
            for match in self._added.finditer(text)
            if match.start() < length < match.end()
        ]
        return min([length, *cuts])


class _TooSlowError(BadConversationError):
    """The template did not terminate."""


def _any_of(tokens: Iterator[str], *patterns: str) -> re.Pattern[str]:
    """Compile a pattern that matches any token, the longest first, as one may begin another."""
    escaped = map(re.escape, sorted(tokens, key=len, reverse=True))
    return re.compile("|".join([*escaped, *patterns]) or "(?!)")


def _after(rendered: str, count: int) -> str:
    """Return the text after the `count`-th probe, without any further probes."""
    return "".join(rendered.split(_PROBE)[count:])


def _with_probe(message: Message, *, at_start: bool) -> Iterator[Message]:
    """Yield copies of a message with the probe in it, at the most promising position first."""
    calls = message.get("tool_calls")
    if isinstance(calls, list) and calls and isinstance(calls[-1], dict):
        function = calls[-1].get("function")
        named = function if isinstance(function, dict) else calls[-1]
        if isinstance(named.get("name"), str):
            changed = named | {"name": named["name"] + _PROBE}
            changed = changed if named is calls[-1] else calls[-1] | {"function": changed}
            yield message | {"tool_calls": [*calls[:-1], changed]}
    content = message.get("content")
    if isinstance(content, list):
        parts = [part["text"] for part in content]
        for number in {0, len(parts) - 1} if parts else ():
            for text in _with_probe_in(parts[number], at_start=at_start):
                part = content[number] | {"text": text}
                yield message | {"content": [*content[:number], part, *content[number + 1 :]]}
    elif isinstance(content, str):
        for text in _with_probe_in(content, at_start=at_start):
            yield message | {"content": text}


def _with_probe_in(text: str, *, at_start: bool) -> Iterator[str]:
    """Yield copies of a text with the probe in it, never outside leading or trailing white space.

    There it would keep a template from stripping that white space.
    """
    answer = text.rfind("</think>") + len("</think>") if "</think>" in text else 0
    beginnings = [place + len(text[place:]) - len(text[place:].lstrip()) for place in (0, answer)]
    end = len(text.rstrip())
    places = [*beginnings, answer] if at_start else [end, (beginnings[1] + end) // 2, beginnings[1]]
    for place in dict.fromkeys(places):
        yield text[:place] + _PROBE + text[place:]


def _parsed(text: str) -> Any:
    """Parse JSON; return the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _text_of(part: Any, message: Message) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    kind = part.get("type") or "text" if isinstance(part, dict) else "text"
    if not isinstance(text, str) or kind not in _TEXT_PARTS:
        raise BadConversationError(
            f"a message of {message['role']} holds a part {str(part)[:60]!r}, and a language model "
            "reads text alone: drop the part or the conversation"
        )
    return text


def _call_of(arguments: Any) -> Message:
    """Make a test message with a tool call, in both forms that templates read."""
    call = {"name": "look", "arguments": arguments}
    calls = [{"type": "function", "id": "call00001", "function": call, **call}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _checked(messages: list[Message]) -> list[Message]:
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            raise BadConversationError(
                f"the corpus holds {str(message)[:80]!r} where a message with role and content was "
                "expected: name a column of messages"
            )
    for message in messages:
        if str(message["role"]) not in _ROLES:
            raise BadConversationError(
                f"{_named(messages)}: role {str(message['role'])[:40]!r} is none of "
                f"{', '.join(sorted(_ROLES))}: correct or drop it"
            )
    return messages


def _named(messages: list[Message]) -> str:
    """Name a conversation by its first user turn, since system turns are often all the same."""
    by_user = (message for message in messages if str(message.get("role")) == "user")
    content = next(by_user, messages[0]).get("content") or ""
    if isinstance(content, list):
        content = "".join(str(part.get("text")) for part in content if isinstance(part, dict))
    said = _MARKS.sub(r"\1", str(content))
    return f"the conversation that begins {said[:60]!r}"
