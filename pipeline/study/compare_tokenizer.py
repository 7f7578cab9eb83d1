"""The tokenizer: text in several scripts, sizes, special tokens, chat template, round trips.

Two sizes are easily confused: the number of ids that the tokenizer can give, and the number of rows
of the embedding (and so of the logits). Qwen2.5 has 151,643 entries and 22 special ones, 151,665
ids in total, and 151,936 rows; its larger models have 152,064 rows.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import Any

from pipeline.study.section import Comparison, Section, Table, compare_tokens
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


def tokenizer(subject: Subject) -> Section:
    """Show how texts are split into tokens and joined again."""
    tok = subject.tokenizer
    samples = {name: encode(tok, text) for name, text in SAMPLES.items()}
    section = Section(
        "tokenizer",
        "Tokenizer",
        tables=[
            Table(
                "Texts",
                ("text", "bytes", "tokens", "pieces"),
                [
                    (name, len(SAMPLES[name].encode()), len(ids), _pieces(tok, ids))
                    for name, ids in samples.items()
                ],
            ),
            Table("Sizes", ("", "number"), _sizes(subject)),
            Table("Special tokens", ("id", "token", "role"), _special(tok), folded=True),
            Table(
                "Normalisation: what comes back",
                ("text", "bytes in", "bytes out", "came back"),
                [_there_and_back(tok, name, text) for name, text in NORMALISATION.items()],
            ),
        ],
    )
    for name, text in SAMPLES.items():
        back = decode(tok, samples[name])
        section.comparisons.append(compare_bytes(f"round trip: {name}", back, expected(tok, text)))
    for name, text in NORMALISATION.items():
        back = decode(tok, encode(tok, text))
        section.comparisons.append(
            compare_bytes(f"normalised as stated: {name}", back, expected(tok, text))
        )
    _add_sizes(section, subject)
    _add_chat(section, tok)
    _add_lost(section, tok)
    return section


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


def compare_bytes(name: str, ours: str, theirs: str) -> Comparison:
    """Compare two texts in UTF-8: the number of bytes that differ."""
    return compare_tokens(name, list(ours.encode()), list(theirs.encode()))


def _pieces(tok: Any, ids: list[int]) -> str:
    """Show each token's own text; a part of a character is shown as bytes."""
    shown = []
    for i in ids:
        text = tok.decode([i], clean_up_tokenization_spaces=False)
        shown.append(_bytes_of(tok, i) if "\ufffd" in text else repr(text)[1:-1])
    return "|".join(shown)


def _bytes_of(tok: Any, token: int) -> str:
    """Return the bytes of a byte-level token in hexadecimal."""
    table = {char: byte for byte, char in enumerate(byte_alphabet())}
    chars = tok.convert_ids_to_tokens(token)
    if not all(char in table for char in chars):
        return f"id {token}"
    return "".join(f"\\x{table[char]:02x}" for char in chars)


def byte_alphabet() -> list[str]:
    """Return GPT-2's character for each byte: printable ones as they are, others from 256 on.

    (Radford et al. 2019, `bytes_to_unicode` in the released code.) The list has 256 entries.
    """
    own = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in own else chr(next(others)) for byte in range(256)]


def _sizes(subject: Subject) -> list[tuple[object, ...]]:
    tok = subject.tokenizer
    vocabulary = tok.get_vocab()
    highest = max(vocabulary.values())
    rows = subject.config.vocab_size
    return [
        ("entries of the vocabulary proper", f"{tok.vocab_size:,}"),
        ("special and added entries", f"{len(tok.added_tokens_decoder):,}"),
        ("ids in all, len(tokenizer)", f"{len(tok):,}"),
        ("highest id + 1", f"{highest + 1:,}"),
        ("ids below that without an entry", f"{highest + 1 - len(set(vocabulary.values())):,}"),
        ("rows of the embedding, and logits", f"{rows:,}"),
        ("rows that no id points to", f"{rows - highest - 1:,}"),
        ("normalisation", unicode_form(tok) or "none of Unicode's"),
    ]


def _add_sizes(section: Section, subject: Subject) -> None:
    highest = max(subject.tokenizer.get_vocab().values())
    rows, width = subject.config.vocab_size, subject.theirs.get_output_embeddings().weight.shape[0]
    section.prose.append(
        f"The tokenizer gives {highest + 1:,} ids, the embedding has {rows:,} rows. "
        + (
            "They are different numbers: no text leads to the further rows, which are to be left "
            "out of every sum over the vocabulary."
            if rows > highest + 1
            else "Here they agree; in Qwen2.5 they do not."
        )
    )
    section.comparisons += [
        Comparison("ids without a row", float(max(0, highest + 1 - rows)), 0),
        Comparison("rows of the head against vocab_size", float(abs(width - rows)), 0),
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


def _add_chat(section: Section, tok: Any) -> None:
    """Apply the chat template; its ids must equal the encoding of its text."""
    if not tok.chat_template:
        section.prose.append("The tokenizer brings no chat template.")
        return
    from jinja2 import TemplateError

    try:
        text = tok.apply_chat_template(_CONVERSATION, tokenize=False)
    except TemplateError as error:
        section.prose.append(f"The chat template refuses a system message or such: {error}.")
        return
    ids = tok.apply_chat_template(_CONVERSATION, tokenize=True, return_dict=False)
    opened = tok.apply_chat_template(_CONVERSATION[:-1], tokenize=False, add_generation_prompt=True)
    section.texts += [
        ("The chat template, applied", text),
        ("The same, open for an answer", opened),
    ]
    section.comparisons.append(
        compare_tokens("chat template: ids against text encoded", encode(tok, text), ids)
    )


def _add_lost(section: Section, tok: Any) -> None:
    """List characters that the vocabulary has no bytes for; they vanish under any normalisation."""
    lost = [char for char in _characters_by_byte() if not _survives(tok, char)]
    if lost:
        section.prose.append(
            f"{len(lost)} of the characters tried, one for each byte of UTF-8, do not come back at "
            "all, since the vocabulary lacks a byte of theirs: "
            + ", ".join(f"U+{ord(char):04X}" for char in lost)
            + "."
        )
    else:
        section.prose.append("A character for each byte of UTF-8 comes back: no byte is missing.")


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
