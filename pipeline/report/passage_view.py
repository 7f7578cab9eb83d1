"""The passage, token by token, as shown on the page.

A model's prediction at position i is for token i + 1, so each token carries the KL of the position
before it, and the first token carries none. KL is shown in fixed steps, so that pages can be
compared.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from pipeline.evaluation.results import TEACHER, Passage, PassageModel

KL_STEPS = (0.1, 0.5, 1.0, 2.0)  # nats; they separate levels 0 to 4
_TOKENS = 512  # with more, the page becomes heavy
_WORST = 6
_CONTEXT = 12  # tokens of context before a token in the list of the worst
_SPACES = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}
_KEPT = {" ": " ", "\n": "↵\n", "\t": "\t"}  # replacements in running text


@dataclass(frozen=True)
class Choice:
    """One of a model's most probable tokens."""

    text: str
    probability: float
    follows: bool  # whether it is the next token in the passage


@dataclass(frozen=True)
class Opinion:
    """A model's prediction for a token."""

    model: str
    kl: float
    probability: float  # of the actual token
    top: list[Choice]


@dataclass(frozen=True)
class PassageToken:
    """A token of the passage; `opinions` is empty for the first."""

    number: int
    text: str  # with a sign before each line end and control characters made visible
    sign: str  # the token shown by itself, with visible spaces too
    levels: list[int]  # 0 to 4 for each student, in the order of `students`
    opinions: list[Opinion]


@dataclass(frozen=True)
class Disagreement:
    """A token at which a student diverges most from the teacher."""

    before: str
    token: PassageToken
    teacher: Opinion
    student: Opinion


@dataclass(frozen=True)
class PassageView:
    """The content of the section."""

    students: list[str]
    tokens: list[PassageToken]
    worst: list[Disagreement]  # for the first student, largest divergence first
    left_out: int  # number of tokens not shown


def passage_view(passage: Passage, student: str | None) -> PassageView | None:
    """Return the passage with `student` as the first student; None if it has no students."""
    names = [name for name in passage.models if name != TEACHER]
    students = sorted(names, key=lambda name: name != student)
    if not students:
        return None
    shown = [TEACHER, *students]
    tokens = [_token(passage, number, shown) for number in range(len(passage.text_tokens))]
    tokens = tokens[:_TOKENS]
    judged = sorted(tokens[1:], key=lambda token: -token.opinions[1].kl)
    worst = [_disagreement(tokens, token) for token in judged[:_WORST]]
    return PassageView(students, tokens, worst, len(passage.text_tokens) - len(tokens))


def visible(text: str) -> str:
    """Show a token by itself: spaces, line ends and control characters become visible signs."""
    return "".join(_sign(character) for character in text) or "∅"


def _sign(character: str) -> str:
    if character in _SPACES:
        return _SPACES[character]
    return chr(0x2400 + ord(character)) if character < " " else character


def _token(passage: Passage, number: int, shown: list[str]) -> PassageToken:
    text = passage.text_tokens[number]
    said = number - 1
    opinions = [_opinion(name, passage.models[name], said, text) for name in shown if number]
    return PassageToken(
        number=number,
        text="".join(_KEPT.get(sign) or visible(sign) for sign in text) or visible(text),
        sign=visible(text),
        levels=[bisect_right(KL_STEPS, opinion.kl) for opinion in opinions[1:]],
        opinions=opinions,
    )


def _opinion(name: str, model: PassageModel, position: int, follows: str) -> Opinion:
    top = [Choice(visible(text), p, text == follows) for text, p in model.top[position]]
    return Opinion(name, model.kl[position], model.p_next[position], top)


def _disagreement(tokens: list[PassageToken], token: PassageToken) -> Disagreement:
    before = tokens[max(0, token.number - _CONTEXT) : token.number]
    text = "".join(part.text for part in before)
    return Disagreement(text, token, token.opinions[0], token.opinions[1])
