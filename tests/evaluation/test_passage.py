"""Tokens as readers see them, and what models expected at each place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from pipeline.config.params import Params
from pipeline.data.corpus_writer import SplitWriter
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import Rows
from pipeline.evaluation.models import open_models
from pipeline.evaluation.passage import first_passage, read_tokens, view_passage
from pipeline.model.tokenizer import load_tokenizer
from tests.helpers import live_teacher
from tests.models import make_teacher, make_tokenizer


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trained on English: a Chinese letter is three tokens, an owl four."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def test_text_is_whole_where_characters_span_tokens(byte_level: Any) -> None:
    text = "a cat\n  sees 猫 and 🦉.\n"
    ids = ids_of(byte_level, text)
    texts, _ = read_tokens(byte_level, ids, [set()] * (len(ids) - 1))
    assert "".join(texts) == text
    assert "\ufffd" not in "".join(texts)
    place = texts.index("猫")
    assert texts[place - 2 : place] == ["", ""]
    assert texts[texts.index("🦉") - 3 : texts.index("🦉")] == ["", "", ""]
    assert texts[:2] == ["a", " cat"]
    assert any("\n" in piece for piece in texts)


def test_a_passage_that_ends_within_a_character_says_so(byte_level: Any) -> None:
    ids = ids_of(byte_level, "a 猫")[:-1]
    texts, _ = read_tokens(byte_level, ids, [set()] * (len(ids) - 1))
    assert "".join(texts).startswith("a ")
    assert texts[-1].endswith("\ufffd")


def test_choices_are_read_where_they_would_stand(byte_level: Any) -> None:
    (start,), (one, two, three), (cat,) = (ids_of(byte_level, t) for t in ("a", "猫", " cat"))
    passage = [start, one, two, three]
    texts, choices = read_tokens(
        byte_level, passage, [{cat, one, 0, 310}, {two, cat}, {three, two, cat}]
    )
    assert texts == ["a", "", "", "猫"]
    assert choices[0] == {cat: " cat", one: "<0xE7>", 0: "<|endoftext|>", 310: "<id 310>"}
    assert choices[1] == {two: "<0x8C>", cat: " cat"}
    assert choices[2] == {three: "猫", two: "猌", cat: " cat"}  # a byte completes the character


def test_tokenizers_that_fall_back_to_bytes() -> None:
    """As of Llama 2: a space belongs to the word after it, a byte is called <0xE7>."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁cat"]
    inner = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    the, cat, letter = 257, 258, [1 + byte for byte in "猫".encode()]
    passage = [the, cat, *letter, cat]
    texts, choices = read_tokens(tokenizer, passage, [{cat, letter[0]}] * 4 + [{the}])
    assert texts == ["the", " cat", "", "", "猫", " cat"]
    assert choices[0] == {cat: " cat", letter[0]: "<0xE7>"}
    assert choices[4] == {the: " the"}


def write_split(place: Path, doc_ids: list[list[int]]) -> CorpusSplit:
    """A validation split whose token at a place is its place."""
    documents = np.array(doc_ids, dtype=np.int32)
    tokens = np.arange(documents.size).reshape(documents.shape)
    writer = SplitWriter(place, "validation", row_length=documents.shape[1], vocab_size=100)
    writer.add(Rows(tokens, documents, documents >= 0))
    writer.commit(num_text_bytes=1, tokenizer_sha256="0" * 64)
    return CorpusSplit(place, "validation")


def test_the_passage_is_the_beginning_of_a_document(tmp_path: Path) -> None:
    # document 0 begins in the first row with 2 tokens of room; 2 begins in the third with 4
    corpus = write_split(tmp_path, [[9, 9, 0, 0], [0, 0, 1, -1], [2, 2, 2, 2], [2, 3, 3, -1]])
    assert first_passage(corpus, 2).tolist() == [0, 1]
    assert first_passage(corpus, 3).tolist() == [8, 9, 10]
    assert first_passage(corpus, 120).tolist() == [8, 9, 10, 11]


def test_views_against_float64(tiny_corpus: Params, tmp_path: Path) -> None:
    other = make_teacher(tmp_path / "other", seed=3)
    corpus = CorpusSplit(tiny_corpus.paths.corpus, "validation")
    teacher = live_teacher(tiny_corpus)
    tokenizer = load_tokenizer(tiny_corpus.paths.teacher)
    opened = open_models(
        {"other": other},
        corpus,
        tiny_corpus.paths.teacher,
        dtypes={"other": torch.float32},
        device=torch.device("cpu"),
    )
    view = view_passage(teacher, opened, corpus, tokenizer, 20)
    passage = torch.from_numpy(first_passage(corpus, 20))
    assert "".join(view.text_tokens) == tokenizer.decode(passage)
    assert len(view.text_tokens) == 20
    assert list(view.models) == ["teacher", "other"]
    exact = {}
    for name, folder in (("teacher", tiny_corpus.paths.teacher), ("other", other)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        with torch.no_grad():
            logits = model(passage[None]).logits[0, :-1].double()
        exact[name] = (logits[:, :300] if name == "teacher" else logits).log_softmax(-1)
    p = exact["teacher"].exp()
    for name, found in view.models.items():
        log_q = exact[name]
        divergence = (p * (exact["teacher"] - log_q[:, :300])).sum(-1)
        assert found.kl == pytest.approx(divergence.tolist(), abs=2e-6)
        following = log_q.exp().gather(-1, passage[1:, None])[:, 0]
        assert found.p_next == pytest.approx(following.tolist(), abs=2e-6)
        best = log_q.exp().topk(5)
        for place, top in enumerate(found.top):
            assert [p for _, p in top] == pytest.approx(best.values[place].tolist(), abs=2e-6)
            assert len({text for text, _ in top}) == 5
    assert view.models["teacher"].kl == [0.0] * 19
    assert max(view.models["other"].kl) > 0.01
