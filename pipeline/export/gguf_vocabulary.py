"""A Hugging Face tokenizer as GGUF metadata: tokens, their types, merges, how text is split.

llama.cpp does not read tokenizer.json. It knows byte-level BPE and some ways to split text before
merging, which are built into it and named in the file as `tokenizer.ggml.pre`. Its own converter
finds the name by a hash of a tokenizer's output for a sample, and therefore only knows published
tokenizers. Decant compares the definition itself, so that a tokenizer that you trained is accepted
too if it splits in one of the ways below. Any other is refused: under a wrong name a file loads,
but the model reads other tokens than it was trained on.

It also knows SentencePiece's BPE (Llama 2, Mistral, Phi-3, Gemma), which merges the pair whose
union has the highest score. tokenizer.json has rules in place of scores. The two agree if each pair
of tokens whose union is a token has a rule, and the rules for one token stand together, as
transformers writes them; then the place of its rules is a token's score.

llama.cpp normalises nothing. Qwen2's NFC leaves nearly all text unchanged and is accepted, so users
who give llama.cpp other text must normalise it first; other normalisers are refused, except those
that replace spaces as SentencePiece does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import DecantError
from pipeline.model.tokenizer import load_tokenizer

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
_GPT2_BYTES, _BYTES = ("ByteLevel", True), ("ByteLevel", False)
_DIGITS = ("Digits", True)
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _CASED % ("", "", "")
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = _CASED % (_ENDINGS, _ENDINGS, "{1,3}")
_PRE_TOKENIZERS: dict[tuple[tuple[Any, ...], bool], str] = {
    ((_GPT2_BYTES,), False): "gpt-2",
    ((_DIGITS, _GPT2_BYTES), False): "smollm",
    ((("Split", _QWEN2), _BYTES), False): "qwen2",
    ((("Split", _LLAMA3), _BYTES), True): "llama-bpe",
    ((("Split", _LLAMA3), _BYTES), False): "dbrx",  # Phi-4
    ((("Split", _GPT4O), _BYTES), False): "gpt-4o",  # Phi-4-mini
    ((("Split", _TEKKEN), _BYTES), True): "tekken",  # Mistral since Nemo
}
"""Steps of a pre-tokenizer, and whether whole words that are tokens skip the merges -> llama.cpp's
name for both (src/llama-vocab.cpp)."""
_SPACE = "\u2581"
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_NORMALIZERS = (_REPLACE, {"type": "Sequence", "normalizers": [_PREPEND, _REPLACE]})
"""Those of SentencePiece's tokenizers, without (Gemma) and with a space in front of a text."""
_ROLES = ("bos", "eos", "unk", "sep", "pad")


def add_tokenizer(writer: Any, folder: Path, rows: int, config: Mapping[str, Any]) -> None:
    """Write the tokenizer of a model folder into a GGUF file's metadata.

    Args:
        writer: a `gguf.GGUFWriter` before its header is written.
        rows: number of embedding rows; those beyond the tokenizer's ids become unused tokens.
        config: the model's config.json, for special ids that the tokenizer does not name.

    Raises:
        DecantError: llama.cpp has no such tokenizer, or it has more ids than the model has rows.
    """
    tokenizer = load_tokenizer(folder)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, kinds = token_table(tokenizer, rows, folder)
    if is_sentencepiece(state):
        _add_sentencepiece(writer, state, tokens, kinds, folder)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_name(state, folder))
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges([" ".join(rule) for rule in _merges(state)])
    for role in _ROLES:
        number = getattr(tokenizer, f"{role}_token_id")
        if number is None:
            number = config.get(f"{role}_token_id")
        if isinstance(number, int) and 0 <= number < rows:
            getattr(writer, f"add_{role}_token_id")(number)
    ids = tokenizer("a")["input_ids"]  # the tokens really added around a text, despite the config
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def is_sentencepiece(state: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer.json falls back to bytes, as SentencePiece's tokenizers do."""
    return state["model"]["type"] == "BPE" and bool(state["model"].get("byte_fallback"))


def pre_tokenizer_name(state: Mapping[str, Any], folder: Path) -> str:
    """Return llama.cpp's name for the way that a tokenizer splits text.

    Args:
        state: content of tokenizer.json.
        folder: folder to name in errors.

    Raises:
        DecantError: it is not byte-level BPE, or llama.cpp has no name for the way it splits.
    """
    model = state["model"]
    if model["type"] != "BPE":
        raise DecantError(
            f"the tokenizer of {folder} is {model['type']}, and GGUF files are written with BPE "
            "alone (GPT-2's, Llama's, Qwen2's, Gemma's): set export.gguf=[]"
        )
    normalizer = (state.get("normalizer") or {"type": "NFC"})["type"]
    if normalizer != "NFC":
        raise DecantError(
            f"the tokenizer of {folder} normalises text by {normalizer}, and llama.cpp does not: "
            "set export.gguf=[]"
        )
    way = _steps(state.get("pre_tokenizer")), bool(model.get("ignore_merges"))
    name = _PRE_TOKENIZERS.get(way)
    if name is None:
        shown = json.dumps(state.get("pre_tokenizer"))
        raise DecantError(
            f"the tokenizer of {folder} splits text in a way that llama.cpp has no name for among "
            f"{', '.join(_PRE_TOKENIZERS.values())} ({shown[:300]}): set export.gguf=[]"
        )
    return name


def _add_sentencepiece(
    writer: Any, state: Mapping[str, Any], tokens: list[str], kinds: list[int], folder: Path
) -> None:
    """Write a tokenizer of SentencePiece's kind.

    Raises:
        DecantError: llama.cpp would give other tokens.
    """
    from gguf import TokenType

    model = state["model"]
    normalizer = state.get("normalizer")
    if normalizer not in _NORMALIZERS or not _splits_nothing(state.get("pre_tokenizer")):
        shown = json.dumps([normalizer, state.get("pre_tokenizer")])
        raise DecantError(
            f"the tokenizer of {folder} is BPE with byte fallback that treats spaces in a way that "
            f"llama.cpp does not have ({shown[:300]}): set export.gguf=[]"
        )
    for added in state["added_tokens"]:
        if not added["normalized"] or added["id"] >= len(tokens):
            continue
        if normalizer != _REPLACE:
            raise DecantError(
                f"the tokenizer of {folder} looks for {added['content']!r} after a space was put "
                "in front of the text, and llama.cpp before that: set export.gguf=[]"
            )
        tokens[added["id"]] = added["content"].replace(_SPACE, " ")
    missing_bytes = {f"<0x{number:02X}>" for number in range(256)}
    places: dict[str, int] = {}  # token -> number of tokens whose rules precede its own
    previous = None
    for left, right in _merges(state):
        union = left + right
        if union != previous and union in places:
            raise _not_sentencepiece(folder, f"the rules for {union!r} do not stand together")
        places.setdefault(union, len(places))
        previous = union
    known = set(map(tuple, _merges(state)))
    scores = []
    for number, token in enumerate(tokens):
        if kinds[number] == TokenType.NORMAL:
            if token in missing_bytes:
                kinds[number] = int(TokenType.BYTE)
                missing_bytes.remove(token)
            elif token == model.get("unk_token"):
                kinds[number] = int(TokenType.UNKNOWN)
            elif missing := _missing_rule(token, model["vocab"], known):
                raise _not_sentencepiece(
                    folder, f"no rule merges {missing[0]!r} and {missing[1]!r}"
                )
        scores.append(-float(places.get(token, len(places) + number)))
    if missing_bytes:
        raise _not_sentencepiece(folder, f"the token {min(missing_bytes)} is missing")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(normalizer != _REPLACE)


def _splits_nothing(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """Return whether text without spaces stays whole."""
    if pre_tokenizer is None:
        return True
    return bool(pre_tokenizer["type"] == "Split" and pre_tokenizer["pattern"] == {"String": " "})


def _missing_rule(
    token: str, vocabulary: Mapping[str, int], known: set[tuple[str, ...]]
) -> tuple[str, str] | None:
    """Return two tokens whose union is `token` and that no rule merges; None if there are none."""
    pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
    both = (pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary)
    return next((pair for pair in both if pair not in known), None)


def _not_sentencepiece(folder: Path, reason: str) -> DecantError:
    return DecantError(
        f"the tokenizer of {folder} is BPE with byte fallback, but not as SentencePiece's, which "
        f"llama.cpp merges by scores of tokens ({reason}): set export.gguf=[]"
    )


def token_table(tokenizer: Any, rows: int, folder: Path) -> tuple[list[str], list[int]]:
    """Return token and type (gguf.TokenType) of each embedding row.

    Special tokens are control tokens, other added ones user-defined: both are found in a text
    before it is split, and control tokens are not shown. A row without a token is unused. Added
    tokens beyond the rows, which the model cannot read, are left out.

    Raises:
        DecantError: an ordinary token lies beyond the rows.
    """
    from gguf import TokenType

    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    if beyond := [number for number in by_id if number >= rows and number not in added]:
        raise DecantError(
            f"the tokenizer of {folder} gives id {max(beyond)}, but the model has {rows} embedding "
            "rows: they do not belong together"
        )
    tokens, kinds = [], []
    for number in range(rows):
        kind = TokenType.NORMAL if number in by_id else TokenType.UNUSED
        if number in added:
            kind = TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED
        tokens.append(by_id.get(number, f"[PAD{number}]"))
        kinds.append(int(kind))
    return tokens, kinds


def _merges(state: Mapping[str, Any]) -> list[list[str]]:
    """Return merges as pairs; older files hold strings (byte-level tokens contain no spaces)."""
    rules = state["model"]["merges"]
    return [rule.split(" ") if isinstance(rule, str) else rule for rule in rules]


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> tuple[Any, ...]:
    """Return the steps of a pre-tokenizer in order, without fields that do not affect tokens."""
    if pre_tokenizer is None:
        return ()
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        inner = [_steps(step) for step in pre_tokenizer["pretokenizers"]]
        return tuple(step for steps in inner for step in steps)
    if kind == "ByteLevel" and not pre_tokenizer["add_prefix_space"]:
        return (("ByteLevel", pre_tokenizer.get("use_regex", True)),)
    if kind == "Digits":
        return (("Digits", pre_tokenizer["individual_digits"]),)
    how = (pre_tokenizer.get("behavior"), pre_tokenizer.get("invert"))
    if kind == "Split" and how == ("Isolated", False):
        return (("Split", pre_tokenizer["pattern"].get("Regex")),)
    return ((kind, json.dumps(pre_tokenizer, sort_keys=True)),)
