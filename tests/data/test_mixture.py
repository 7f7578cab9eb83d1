"""Mixtures of sources: the order of documents, their shares of tokens, and where a split ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config.names import corpus_name
from pipeline.config.params import Params, load_params
from pipeline.data import mixture, tokenizer_pool
from pipeline.data.corpus import build_corpus
from pipeline.data.corpus_zarr import SPLITS, CorpusSplit
from pipeline.errors import DecantError, ParamsError
from pipeline.model.tokenizer import load_tokenizer
from tests.helpers import change
from tests.models import make_sentences


def write(file: Path, texts: list[str]) -> dict[str, Any]:
    """A file of texts, as the source that it is."""
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"source": "files", "files": {"paths": [str(file)], "column": "text"}}


@pytest.fixture
def three(tiny_params: Params, tmp_path: Path) -> Params:
    """Three sources, which their documents name, with lengths that differ."""
    sources = []
    for number, (name, weight) in enumerate({"a": 3.0, "b": 1.0, "c": 0.5}.items()):
        texts = [f"{name}: {text}" for text in make_sentences(400, seed=number)]
        if name == "b":
            texts = [f"{one} {two}" for one, two in zip(texts[::2], texts[1::2], strict=True)]
        sources.append(write(tmp_path / f"{name}.jsonl", texts) | {"weight": weight})
    changes = {"sources": sources, "train_tokens": 6000, "validation_tokens": 1500}
    return change(tiny_params, corpus=changes)


def documents_of(params: Params, split: str) -> list[tuple[str, int]]:
    """The source and the number of tokens of each document."""
    corpus = CorpusSplit(params.paths.corpus, split)
    rows = corpus.rows(0, len(corpus))
    tokenizer = load_tokenizer(params.paths.teacher)
    found = []
    for number in range(corpus.info.num_documents):
        tokens = rows.tokens[rows.doc_ids == number]
        found.append((tokenizer.decode(tokens)[0], len(tokens)))
    return found


def test_shares_hold_to_within_one_document(
    three: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    build_corpus(three.corpus, three.paths.teacher, three.paths.corpus)
    said = capsys.readouterr().out
    assert "corpus: cuts a mixture of 3 corpus.sources into rows of 32" in said
    weights = dict(zip("abc", (source.weight for source in three.corpus.sources), strict=True))
    for split in SPLITS:
        tokens = dict.fromkeys("abc", 0)
        largest = 0
        for name, length in documents_of(three, split):
            assert tokens[name] / weights[name] == min(tokens[n] / weights[n] for n in "abc")
            tokens[name] += length
            largest = max(largest, length)
            for other in "abc":
                share = weights[other] / sum(weights.values())
                assert abs(tokens[other] - share * sum(tokens.values())) <= largest
        total = sum(tokens.values())
        line = ", ".join(
            f"{tokens[name] / total:.1%} from files {source.files.paths[0]} "
            f"(weight {source.weight:g})"
            for name, source in zip("abc", three.corpus.sources, strict=True)
        )
        assert f"of the {total:,} tokens of {split} come {line}" in said
        assert f"{split} is full at corpus.{split}_tokens={total:,} after" in said
    assert "has no more documents" not in said


def test_a_split_ends_with_the_first_source_that_does(
    three: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    params = change(three, corpus={"train_tokens": None, "validation_tokens": 10**6})
    build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    said = capsys.readouterr().out
    file = params.corpus.sources[0].files.paths[0]
    for split in SPLITS:  # a has the greatest weight for its text
        assert f"{split} ends where files {file} has no more documents; those of the" in said
    found = [name for split in SPLITS for name, _ in documents_of(params, split)]
    assert found.count("a") == 400  # all of it
    assert 0 < found.count("c") < 400


def test_duplicates_across_sources_are_dropped(
    tiny_params: Params, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = make_sentences(60, seed=1)
    sources = [write(tmp_path / f"{name}.jsonl", texts) for name in "ab"]
    changes = {"sources": sources, "train_tokens": None, "validation_tokens": 10**6}
    params = change(tiny_params, corpus=changes)
    infos = build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    assert sum(info.num_documents for info in infos.values()) == 60
    assert "exact duplicates are left out of train" in capsys.readouterr().out


@pytest.mark.parametrize("at_once", [1, 7])
def test_the_order_depends_neither_on_blocks_nor_on_workers(
    at_once: int, three: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_corpus(three.corpus, three.paths.teacher, three.paths.corpus)
    before = {split: CorpusSplit(three.paths.corpus, split).info for split in SPLITS}
    monkeypatch.setattr(mixture, "_DOCUMENTS_AT_ONCE", at_once)
    monkeypatch.setattr(tokenizer_pool, "START_SECONDS", 0.01)
    workers = 2 if at_once == 7 else 1
    build_corpus(three.corpus, three.paths.teacher, three.paths.corpus, workers=workers)
    assert {split: CorpusSplit(three.paths.corpus, split).info for split in SPLITS} == before


def test_a_source_without_validation_text_is_named(tiny_params: Params, tmp_path: Path) -> None:
    sources = [
        write(tmp_path / "one.jsonl", ["one"]),
        write(tmp_path / "many.jsonl", make_sentences(80, seed=1)),
    ]
    params = change(tiny_params, corpus={"sources": sources})
    with pytest.raises(
        DecantError,
        match=r"split of a mixture of 2 corpus\.sources came out empty, since files .*one\.jsonl "
        "has no document for it",
    ):
        build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)


@pytest.mark.parametrize("weight", ["0", "-1", "inf", "much"])
def test_a_bad_weight_is_one_sentence(weight: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("{}")
    sources = f"corpus.sources=[{{source:stdlib,weight:2}},{{source:hub,weight:{weight}}}]"
    with pytest.raises(ParamsError) as caught:
        load_params(tmp_path / "params.yaml", [sources])
    assert "corpus.sources.1.weight=" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mixture_is_named_by_its_shares() -> None:
    corpus = load_params_of({"sources": [{"source": "stdlib", "weight": 3}, {"source": "hub"}]})
    assert corpus_name(corpus.corpus) == (
        "75.0% the source files of Python's standard library, 25.0% wikimedia/wikipedia 20231101.zh"
    )
    with pytest.raises(ValidationError, match="greater than 0"):
        load_params_of({"sources": [{"weight": 0}]})


def load_params_of(corpus: dict[str, Any]) -> Params:
    return Params.model_validate({"corpus": corpus})


def test_memory_is_bounded_when_most_documents_are_for_validation(
    tiny_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few documents wait for one split while rows of the other are packed."""
    waits: list[int] = []
    ask = mixture.Mixture.num_waiting

    def num_waiting(self: mixture.Mixture, split: str) -> int:
        waits.append(ask(self, split))
        return waits[-1]

    monkeypatch.setattr(mixture.Mixture, "num_waiting", num_waiting)
    monkeypatch.setattr("pipeline.data.corpus._ROWS_AT_ONCE", {"concat": 16})
    for fraction in (0.1, 0.9):
        changes = {"train_tokens": None, "validation_tokens": 10**6, "row_length": 64}
        params = change(tiny_params, corpus=changes | {"validation_fraction": fraction})
        infos = build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
        total = sum(info.num_tokens for info in infos.values())
        assert 0 < max(waits) < 2 * 16 * 64 < total / 5
