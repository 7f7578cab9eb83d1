"""The tokenizer: text in several scripts, sizes, special tokens, chat template, round trips.

Two sizes are easily confused: the number of ids that the tokenizer can give, and the number of rows
of the embedding (and so of the logits). Qwen2.5 has 151,643 entries and 22 special ones, 151,665
ids in total, and 151,936 rows; its larger models have 152,064 rows.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import Any

from pipeline.runtime.optional import require
from pipeline.study.comparison import Comparison, Part, compare_sequences
from pipeline.study.subject import Subject

SAMPLES = {
    "English": "The teacher runs once; every later training run reads the cache.",
    "Chinese": "教师模型只运行一次，之后的训练都读取缓存。",  # noqa: RUF001
    "mixed": "用 PyTorch 2 训练 a small 学生模型, 3.5x faster。",
    "code": "def f(x: int) -> int:\n    return x ** 2  # \tsquare\n",
    "special characters": '<a href="x">&amp;</a>  \\n ~!@#$%^&*()_+ “quotes” — ½ µ',
    "emoji": "🙂 👩‍🔬 🇫🇷 👍🏽",
    "numbers": "2024-12-31 3.14159 1,000,000 0xFF",
    "white space": "  two  spaces\t\ttabs\n\n\nlines \r\n",
}

NORMALISATION = {
    "e and combining acute": "e\u0301",
    "Angstrom sign": "\u212b",
    "Ohm sign": "\u2126",
    "Hangul in letters": "\u1112\u1161\u11ab",
    "compatibility ideograph": "\uf9d0",
    "ligature fi": "\ufb01",
    "full-width A": "\uff21",
}
"""Characters that Unicode can write in two ways. NFC changes the first five, NFKC all."""

_CONVERSATION = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris"},
]


def tokenizer(subject: Subject) -> Part:
    """Show how texts are split into tokens and joined again."""
    tok = subject.tokenizer
    samples = {name: encode(tok, text) for name, text in SAMPLES.items()}
    part = Part(
        name="tokenizer",
        title="Tokenizer",
        comparisons=[
            *(_round_trip(tok, f"round trip: {name}", text) for name, text in SAMPLES.items()),
            *(
                _round_trip(tok, f"normalised as stated: {name}", text)
                for name, text in NORMALISATION.items()
            ),
        ],
        tables={
            "Texts": [
                ("text", "bytes", "tokens", "pieces"),
                *(
                    (name, len(SAMPLES[name].encode()), len(ids), _pieces(tok, ids))
                    for name, ids in samples.items()
                ),
            ],
            "Special tokens": [("id", "token", "role"), *_special(tok)],
            "Normalisation": [
                ("text", "bytes in", "bytes out", "came back"),
                *(_there_and_back(tok, name, text) for name, text in NORMALISATION.items()),
            ],
        },
    )
    _add_sizes(part, subject)
    _add_chat(part, tok)
    _add_lost(part, tok)
    return part


def encode(tok: Any, text: str) -> list[int]:
    """Return the ids of a text, without special tokens before or after it."""
    ids: list[int] = tok(text, add_special_tokens=False)["input_ids"]
    return ids


def decode(tok: Any, ids: list[int]) -> str:
    """Return the text of ids, without any clean-up."""
    text: str = tok.decode(ids, clean_up_tokenization_spaces=False)
    return text


def expected(tok: Any, text: str) -> str:
    """Return the text that should come back: in the tokenizer's own Unicode form, if it has one."""
    form = unicode_form(tok)
    return text if form is None else unicodedata.normalize(form, text)


def unicode_form(tok: Any) -> Any:
    """Return NFC, NFD, NFKC or NFKD if the tokenizer's normaliser is or contains it; else None."""
    normalizer = tok.backend_tokenizer.normalizer
    if normalizer is None:
        return None
    named = repr(normalizer)
    return next((f for f in ("NFKC", "NFKD", "NFC", "NFD") if f"{f}()" in named), None)


def _round_trip(tok: Any, name: str, text: str) -> Comparison:
    """Count the bytes of UTF-8 in which a text comes back other than expected."""
    back = decode(tok, encode(tok, text))
    return compare_sequences(name, list(back.encode()), list(expected(tok, text).encode()))


def _pieces(tok: Any, ids: list[int]) -> str:
    """Show each token's own text; a part of a character is shown as bytes."""
    shown = []
    for i in ids:
        text = tok.decode([i], clean_up_tokenization_spaces=False)
        shown.append(_bytes_of(tok, i) if "\ufffd" in text else repr(text)[1:-1])
    return "|".join(shown)


def _bytes_of(tok: Any, token: int) -> str:
    """Return the bytes of a byte-level token in hexadecimal."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    table = {char: byte for byte, char in bytes_to_unicode().items()}
    chars = tok.convert_ids_to_tokens(token)
    if not all(char in table for char in chars):
        return f"id {token}"
    return "".join(f"\\x{table[char]:02x}" for char in chars)


def _add_sizes(part: Part, subject: Subject) -> None:
    tok, rows = subject.tokenizer, subject.config.vocab_size
    width = subject.theirs.get_output_embeddings().weight.shape[0]
    vocabulary = tok.get_vocab()
    ids = max(vocabulary.values()) + 1
    part.tables["Sizes"] = [
        ("", "number"),
        ("entries of the vocabulary proper", f"{tok.vocab_size:,}"),
        ("special and added entries", f"{len(tok.added_tokens_decoder):,}"),
        ("ids in all, len(tokenizer)", f"{len(tok):,}"),
        ("highest id + 1", f"{ids:,}"),
        ("ids below that without an entry", f"{ids - len(set(vocabulary.values())):,}"),
        ("rows of the embedding, and logits", f"{rows:,}"),
        ("rows that no id points to", f"{rows - ids:,}"),
        ("normalisation", unicode_form(tok) or "none of Unicode's"),
    ]
    part.notes.append(
        f"The tokenizer gives {ids:,} ids, the embedding has {rows:,} rows. "
        + (
            "They are different numbers: no text leads to the further rows, which are to be left "
            "out of every sum over the vocabulary."
            if rows > ids
            else "Here they agree; in Qwen2.5 they do not."
        )
    )
    part.comparisons += [
        Comparison("ids without a row", max(0, ids - rows), 0),
        Comparison("rows of the head against vocab_size", abs(width - rows), 0),
    ]


def _special(tok: Any) -> list[tuple[object, ...]]:
    roles: dict[str, list[str]] = {}
    for role, token in tok.special_tokens_map.items():
        if isinstance(token, str):
            roles.setdefault(token, []).append(role.removesuffix("_token"))
    return [
        (
            i,
            str(token),
            ", ".join([*roles.get(str(token), []), *([] if token.special else ["not special"])]),
        )
        for i, token in sorted(tok.added_tokens_decoder.items())
    ]


def _there_and_back(tok: Any, name: str, text: str) -> tuple[object, ...]:
    back = decode(tok, encode(tok, text))
    same = "as it was" if back == text else f"as {back}, not {text}"
    return (name, text.encode().hex(" "), back.encode().hex(" "), same)


def _add_chat(part: Part, tok: Any) -> None:
    """Apply the chat template; its ids must equal the encoding of its text."""
    if not tok.chat_template:
        part.notes.append("The tokenizer brings no chat template.")
        return
    jinja2 = require("jinja2", "report", "the chat template's part of the study")
    try:
        text = tok.apply_chat_template(_CONVERSATION, tokenize=False)
    except jinja2.TemplateError as error:
        part.notes.append(f"The chat template refuses a system message or such: {error}.")
        return
    ids = tok.apply_chat_template(_CONVERSATION, tokenize=True, return_dict=False)
    opened = tok.apply_chat_template(_CONVERSATION[:-1], tokenize=False, add_generation_prompt=True)
    part.texts["The chat template, applied"] = text
    part.texts["The same, open for an answer"] = opened
    part.comparisons.append(
        compare_sequences("chat template: ids against text encoded", encode(tok, text), ids)
    )


def _add_lost(part: Part, tok: Any) -> None:
    """List characters that the vocabulary has no bytes for; they vanish under any normalisation."""
    lost = [char for char in _characters_by_byte() if not _survives(tok, char)]
    if lost:
        part.notes.append(
            f"{len(lost)} of the characters tried, one for each byte of UTF-8, do not come back at "
            "all, since the vocabulary lacks a byte of theirs: "
            + ", ".join(f"U+{ord(char):04X}" for char in lost)
            + "."
        )
    else:
        part.notes.append("A character for each byte of UTF-8 comes back: no byte is missing.")


def _survives(tok: Any, char: str) -> bool:
    return decode(tok, encode(tok, char)) == expected(tok, char)


def _characters_by_byte() -> Iterator[str]:
    """Yield, for each byte that UTF-8 can contain, about the first assigned character with it."""
    yield from map(chr, range(128))  # single bytes
    for lead in range(0xC2, 0xF5):
        length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
        tails = range(0x80, 0xC0) if lead == 0xC3 else [0x90 if lead == 0xF0 else 0x80]
        if lead == 0xE0:
            tails = [0xA0]
        for tail in tails:
            yield bytes([lead, tail, *[0x80] * (length - 2)]).decode()
