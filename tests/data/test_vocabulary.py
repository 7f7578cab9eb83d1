"""Whose ids are the corpus's: files that differ in bytes, control tokens, other tokenizers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.params import Params
from pipeline.data.corpus_zarr import SPLITS, CorpusSplit
from pipeline.data.vocabulary import read_vocabulary, require_shared_ids
from pipeline.errors import DecantError, MismatchError
from tests.models import make_tokenizer


def edited(params: Params, folder: Path, edit: Callable[[Any], object]) -> Path:
    """A folder whose tokenizer is the corpus's, changed."""
    folder.mkdir()
    content = json.loads((params.paths.teacher / "tokenizer.json").read_text())
    edit(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def check(params: Params, start: Path, tokenizer: Path | None = None) -> None:
    corpora = [CorpusSplit(params.paths.corpus, split) for split in SPLITS]
    require_shared_ids(start, corpora, tokenizer or params.paths.teacher)


def rename(content: Any, number: int, token: str) -> None:
    vocab = content["model"]["vocab"]
    old = next(text for text, i in vocab.items() if i == number)
    del vocab[old]
    vocab[token] = number


def add_control(content: Any, number: int, token: str) -> None:
    """Put a control token in place of, or after, the others."""
    for text in [text for text, i in content["model"]["vocab"].items() if i == number]:
        del content["model"]["vocab"][text]
    entry = content["added_tokens"][0] | {"id": number, "content": token}
    kept = [old for old in content["added_tokens"] if old["id"] != number]
    content["added_tokens"] = [*kept, entry]


def rules_as_pairs(content: Any) -> None:
    content["model"]["merges"] = [
        rule.split(" ") if isinstance(rule, str) else rule for rule in content["model"]["merges"]
    ]


def rules_as_strings(content: Any) -> None:
    content["model"]["merges"] = [
        rule if isinstance(rule, str) else " ".join(rule) for rule in content["model"]["merges"]
    ]


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content.update(truncation=None, padding=None, version="1.0 "),
        rules_as_pairs,
        rules_as_strings,
        lambda content: add_control(content, 300, "<|im_start|>"),  # beyond the corpus's ids
    ],
)
def test_files_that_differ_and_mean_the_same(
    edit: Callable[[Any], object], tiny_corpus: Params, tmp_path: Path
) -> None:
    start = edited(tiny_corpus, tmp_path / "start", edit)
    theirs = (tiny_corpus.paths.teacher / "tokenizer.json").read_bytes()
    assert (start / "tokenizer.json").read_bytes() != theirs
    check(tiny_corpus, start)


def test_another_ordinary_token_is_named(tiny_corpus: Params, tmp_path: Path) -> None:
    start = edited(tiny_corpus, tmp_path / "start", lambda c: rename(c, 290, "other"))
    with pytest.raises(MismatchError, match=r"id 290 is 'other' there and '.+' in the corpus"):
        check(tiny_corpus, start)


def test_a_vocabulary_of_its_own_is_refused(tiny_corpus: Params, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "start", vocab_size=280)
    with pytest.raises(MismatchError, match=r"id 280 is None there .* and 19 more differ"):
        check(tiny_corpus, tmp_path / "start")


def test_other_merge_rules_are_refused(tiny_corpus: Params, tmp_path: Path) -> None:
    def swap(content: Any) -> None:
        rules = content["model"]["merges"]
        rules[4], rules[5] = rules[5], rules[4]

    start = edited(tiny_corpus, tmp_path / "start", swap)
    with pytest.raises(MismatchError, match=r"merges by other rules from rule 4 on"):
        check(tiny_corpus, start)


def test_control_tokens_may_differ_where_the_corpus_does_not_hold_them(
    tiny_corpus: Params, tmp_path: Path
) -> None:
    """Id 0 closes every document; of the others, some the text holds and some it does not."""
    ends = edited(tiny_corpus, tmp_path / "ends", lambda c: add_control(c, 0, "<|other|>"))
    with pytest.raises(MismatchError, match=r"id 0 is '<\|other\|>' there and '<\|endoftext\|>'"):
        check(tiny_corpus, ends)
    used = set()
    for split in SPLITS:
        corpus = CorpusSplit(tiny_corpus.paths.corpus, split)
        used |= set(corpus.rows(0, len(corpus)).tokens.flatten().tolist())
    unused = max(set(range(300)) - used)
    quiet = edited(tiny_corpus, tmp_path / "quiet", lambda c: add_control(c, unused, "<|tool|>"))
    merges = read_vocabulary(tiny_corpus.paths.teacher).merges
    assert read_vocabulary(quiet).merges == merges
    check(tiny_corpus, quiet)
    loud = edited(tiny_corpus, tmp_path / "loud", lambda c: add_control(c, max(used), "<|tool|>"))
    with pytest.raises(MismatchError, match=rf"id {max(used)} is '<\|tool\|>' there"):
        check(tiny_corpus, loud)


def test_nothing_to_compare_with(tiny_corpus: Params, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    with pytest.raises(DecantError, match=r"bare holds no tokenizer\.json"):
        check(tiny_corpus, tmp_path / "bare")
    same = tmp_path / "same"
    same.mkdir()
    shutil.copy(tiny_corpus.paths.teacher / "tokenizer.json", same / "tokenizer.json")
    check(tiny_corpus, same, tmp_path / "gone")  # the same bytes need no comparison
    start = edited(tiny_corpus, tmp_path / "start", lambda c: c.update(version="1.0 "))
    with pytest.raises(MismatchError, match=r"which .*gone does not hold"):
        check(tiny_corpus, start, tmp_path / "gone")
    for content in ('{"model": 1}', '{"model": {"vocab": {"a": 0}, "merges": [1]}}'):
        (start / "tokenizer.json").write_text(content)
        with pytest.raises(DecantError, match="cannot be read as a tokenizer"):
            check(tiny_corpus, start)


def test_unigram_vocabularies_are_lists(tmp_path: Path) -> None:
    content = {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0]]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert read_vocabulary(tmp_path).tokens == {0: "<unk>", 1: "a"}
