"""A Hugging Face tokenizer as GGUF metadata: tokens, their types, merges, how text is split.

llama.cpp does not read tokenizer.json. It knows byte-level BPE and some ways to split text before
merging, which are built into it and named in the file as `tokenizer.ggml.pre`. Its own converter
finds the name by a hash of a tokenizer's output for a sample, and therefore only knows published
tokenizers. Decant compares the definition itself, so that a tokenizer that you trained is accepted
too if it splits in one of the ways below. Any other is refused: under a wrong name a file loads,
but the model reads other tokens than it was trained on.

llama.cpp normalises nothing. Qwen2's NFC leaves nearly all text unchanged and is accepted, so users
who give llama.cpp other text must normalise it first; other normalisers are refused.
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
_PRE_TOKENIZERS: dict[tuple[Any, ...], str] = {
    (_GPT2_BYTES,): "gpt-2",
    (_DIGITS, _GPT2_BYTES): "smollm",
    (("Split", _QWEN2), _BYTES): "qwen2",
    (("Split", _LLAMA3), _BYTES): "llama-bpe",
}
"""Steps of a pre-tokenizer -> llama.cpp's name for them (src/llama-vocab.cpp)."""
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
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(state, folder))
    tokens, kinds = token_table(tokenizer, rows, folder)
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


def pre_tokenizer_name(state: Mapping[str, Any], folder: Path) -> str:
    """Return llama.cpp's name for the way that a tokenizer splits text.

    Args:
        state: content of tokenizer.json.
        folder: folder to name in errors.

    Raises:
        DecantError: it is not byte-level BPE, or llama.cpp has no name for the way it splits.
    """
    model, steps = state["model"], _steps(state.get("pre_tokenizer"))
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "BPE with byte fallback" if model["type"] == "BPE" else model["type"]
        raise DecantError(
            f"the tokenizer of {folder} is {kind}, and GGUF files are written with byte-level BPE "
            "alone (GPT-2's, Llama 3's, Qwen2's): set export.gguf=[]"
        )
    normalizer = (state.get("normalizer") or {"type": "NFC"})["type"]
    if normalizer != "NFC":
        raise DecantError(
            f"the tokenizer of {folder} normalises text by {normalizer}, and llama.cpp does not: "
            "set export.gguf=[]"
        )
    name = _PRE_TOKENIZERS.get(steps)
    if name is None or model.get("ignore_merges", False) != (name == "llama-bpe"):
        shown = json.dumps(state.get("pre_tokenizer"))
        raise DecantError(
            f"the tokenizer of {folder} splits text in a way that llama.cpp has no name for among "
            f"{', '.join(_PRE_TOKENIZERS.values())} ({shown[:300]}): set export.gguf=[]"
        )
    return name


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
