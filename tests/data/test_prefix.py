"""The first tokens of a text against those of the whole text's tokenization."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.data.prefix import PrefixEncoder
from tests.models import make_sentences

# Those of GPT-4 (Llama 3's too; Qwen's has single digits) and of o200k, which tells letter case.
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|" + GPT4  # digits in threes, as in numbers

PIECES = ["the", " cat", "  ", "\n", "\n\n", " \n ", ".", ", ", "1", "234", "x1", "don't", "'s"]
PIECES += ["XMLHttp", "é", "猫", "、", "。", "🐈", "\t", "()", "_", "-", "…", "½", "e\u0301"]


def sample(seed: int, count: int) -> str:
    return "".join(random.Random(seed).choices(PIECES, k=count))


def trained(kind: str) -> PreTrainedTokenizerFast:
    corpus = [*make_sentences(50, seed=1), *(sample(seed, 300) for seed in range(30))]
    special = ["<unk>", "<s>", "</s>"]
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    elif kind == "sentencepiece":  # as Llama 2 and Gemma: no pre-tokenizer, spaces as ▁
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        prepended = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(prepended)
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        expressions = {"gpt2": "", "gpt4": GPT4, "o200k": O200K, "right": FROM_THE_RIGHT}
        split = (
            [] if kind == "gpt2" else [pre_tokenizers.Split(Regex(expressions[kind]), "isolated")]
        )
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator(corpus, trainer)
    if kind == "sentencepiece":
        tokenizer.pre_tokenizer = None  # type: ignore[assignment]  # only training had one
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


KINDS = ["gpt2", "gpt4", "o200k", "right", "sentencepiece", "unigram"]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {kind: trained(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 400), limit=st.integers(1, 30))
def test_the_first_tokens_are_those_of_the_whole_text(
    kind: str, seed: int, count: int, limit: int, tokenizers: dict[str, Any]
) -> None:
    tokenizer, text = tokenizers[kind], sample(seed, count)
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    encoder = PrefixEncoder(tokenizer, limit)
    found = encoder(text, limit, as_text=True, start=1)
    assert found.ids == whole["input_ids"][:limit]
    assert found.offsets == whole["offset_mapping"][:limit]
    assert found.is_whole == (len(whole["input_ids"]) <= limit)
    short = tokenizer("a", add_special_tokens=False)["input_ids"]
    assert encoder.texts([text, "a", text]) == [
        (whole["input_ids"][:limit], found.is_whole),
        (short[:limit], len(short) <= limit),
        (whole["input_ids"][:limit], found.is_whole),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_not_tokenized_whole(kind: str, tokenizers: dict[str, Any]) -> None:
    seen = []

    class Counting:
        def __call__(self, texts: Any, **options: Any) -> Any:
            seen.append(sum(map(len, [texts] if isinstance(texts, str) else texts)))
            return tokenizers[kind](texts, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizers[kind], name)

    text = " ".join(make_sentences(300, seed=2))
    ids = tokenizers[kind](text, add_special_tokens=False)["input_ids"]
    assert PrefixEncoder(Counting(), 100).texts([text]) == [(ids[:100], False)]
    assert max(seen) < 1000 < 50_000 < len(text)


def test_a_vocabulary_that_joins_words_is_not_cut_there() -> None:
    """Merges across a space, as of tokenizers without a pre-tokenizer: no place is safe."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator(["ab ab ab ab. " * 20], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert any("b a" in entry for entry in fast.get_vocab())
    text = "ab " * 7 + "b a" * 50
    whole = fast(text, add_special_tokens=False)["input_ids"]
    for limit in range(1, len(whole) + 2):
        assert PrefixEncoder(fast, limit)(text, limit, as_text=True, start=1).ids == whole[:limit]


def test_words_marked_at_their_end_are_tokenized_whole(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=80, special_tokens=["</s>"], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(make_sentences(20, seed=3), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    text = "the cat, sees. a river " * 20
    whole = fast(text, add_special_tokens=False)["input_ids"]
    assert PrefixEncoder(fast, 7)(text, 7, as_text=True, start=1).ids == whole[:7]
