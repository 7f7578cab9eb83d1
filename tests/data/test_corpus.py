from __future__ import annotations

import hashlib
import json
import re
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pipeline.config.params import Params
from pipeline.data.corpus import build_corpus, load_tokenizer
from pipeline.data.corpus_writer import SplitWriter
from pipeline.data.corpus_zarr import SPLITS, CorpusSplit, chain_rows, hash_rows
from pipeline.data.packing import PADDING, Rows
from pipeline.errors import DecantError, MismatchError, ParamsError
from tests.helpers import change, open_cache
from tests.models import make_sentences, make_teacher


def documents_of(params: Params, split: str) -> list[str]:
    corpus = CorpusSplit(params.paths.corpus, split)
    rows = corpus.rows(0, len(corpus))
    tokens, doc_ids = rows.tokens.flatten(), rows.doc_ids.flatten()
    tokenizer = load_tokenizer(params.paths.teacher)
    return [tokenizer.decode(tokens[doc_ids == n]) for n in range(corpus.info.num_documents)]


def test_round_trip_and_what_is_counted(tiny_params: Params, text_folder: Path) -> None:
    params = change(tiny_params, corpus={"train_tokens": None, "validation_tokens": 10**6})
    infos = build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    lines = (text_folder / "documents.jsonl").read_text().splitlines()
    texts = {json.loads(line)["text"] for line in lines}
    found = {split: documents_of(params, split) for split in SPLITS}
    assert all(text.endswith("<|endoftext|>") for split in SPLITS for text in found[split])
    stripped = {s: {t.removesuffix("<|endoftext|>") for t in found[s]} for s in SPLITS}
    assert stripped["train"] | stripped["validation"] == texts
    assert not stripped["train"] & stripped["validation"]
    for split in SPLITS:
        info = infos[split]
        assert asdict(CorpusSplit(params.paths.corpus, split).info) == asdict(info)
        assert info.num_text_bytes == sum(len(text.encode()) for text in stripped[split])
        rows = CorpusSplit(params.paths.corpus, split).rows(0, info.num_rows)
        real = rows.doc_ids != PADDING
        assert info.num_tokens == real.sum()
        assert info.num_used_ids == len(np.unique(rows.tokens[real]))


def test_limits_are_exact(tiny_params: Params) -> None:
    infos = build_corpus(tiny_params.corpus, tiny_params.paths.teacher, tiny_params.paths.corpus)
    assert infos["train"].num_tokens == 3000
    assert infos["train"].num_rows == -(-3000 // 32)
    assert infos["validation"].num_tokens == 600


def test_same_input_same_hash_other_input_other_hash(tiny_params: Params) -> None:
    def hashes(params: Params) -> list[str]:
        built = build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
        return [built[split].sha256 for split in SPLITS]

    first = hashes(tiny_params)
    assert hashes(tiny_params) == first
    assert hashes(change(tiny_params, corpus={"row_length": 16})) != first


def test_duplicates_are_dropped(tiny_params: Params, tmp_path: Path) -> None:
    file = tmp_path / "twice.jsonl"
    texts = [f"document number {i}" for i in range(40)] * 2
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    params = change(
        tiny_params,
        corpus={"files": {"paths": [str(file)], "column": "text"}, "validation_tokens": 10**6},
    )
    build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    found = documents_of(params, "train") + documents_of(params, "validation")
    assert sorted(found) == sorted({f"{text}<|endoftext|>" for text in texts})


def test_long_documents_are_cut_and_carry_no_end(tiny_params: Params) -> None:
    params = change(tiny_params, corpus={"max_document_tokens": 20})
    build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    corpus = CorpusSplit(params.paths.corpus, "train")
    rows = corpus.rows(0, len(corpus))
    counts = np.bincount(rows.doc_ids[rows.doc_ids != PADDING])
    assert counts.max() == 20
    assert not any("<|endoftext|>" in text for text in documents_of(params, "train")[:5])


@pytest.mark.parametrize("kind", ["txt", "parquet"])
def test_other_kinds_of_files(kind: str, tiny_params: Params, tmp_path: Path) -> None:
    texts = [f"This is document {i}.\nIt has two lines." for i in range(30)]
    if kind == "txt":
        for i, text in enumerate(texts):
            (tmp_path / f"{i}.txt").write_text(text)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"body": texts}), tmp_path / "all.parquet")
    params = change(
        tiny_params,
        corpus={
            "files": {"paths": [str(tmp_path / f"*.{kind}")], "column": "body"},
            "train_tokens": None,
            "validation_tokens": 10**6,
        },
    )
    build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    found = documents_of(params, "train") + documents_of(params, "validation")
    assert sorted(found) == sorted(f"{text}<|endoftext|>" for text in texts)


def test_markup_of_special_tokens_in_text_stays_text(tiny_params: Params, tmp_path: Path) -> None:
    file = tmp_path / "tricky.jsonl"
    texts = [f"before <|endoftext|> after {i}" for i in range(40)]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    params = change(tiny_params, corpus={"files": {"paths": [str(file)], "column": "text"}})
    build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    corpus = CorpusSplit(params.paths.corpus, "train")
    rows = corpus.rows(0, len(corpus))
    for number in range(corpus.info.num_documents - 1):
        tokens = rows.tokens[rows.doc_ids == number].tolist()
        assert tokens.count(0) == 1
        assert tokens[-1] == 0


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"paths": ["/nowhere/*.txt"], "column": "text"}, DecantError, "nothing matches"),
        (
            {"paths": ["{text}/*.jsonl"], "column": "body"},
            ParamsError,
            "no column 'body', only text",
        ),
        ({"paths": ["{work}/params.yaml"], "column": "text"}, ParamsError, "one kind out of"),
        ({"paths": ["{work}/broken.jsonl"], "column": "text"}, DecantError, "cannot be read"),
        ({"paths": ["{work}/empty.jsonl"], "column": "text"}, DecantError, "came out empty"),
    ],
)
def test_bad_sources_are_one_sentence(
    files: dict[str, object],
    error: type[Exception],
    message: str,
    tiny_params: Params,
    text_folder: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "unfinished')
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n{"text": "  "}\n')
    paths = [str(p).format(text=text_folder, work=tmp_path) for p in files["paths"]]  # type: ignore[attr-defined]
    params = change(tiny_params, corpus={"files": files | {"paths": paths}})
    with pytest.raises(error, match=message) as caught:
        build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    assert "\n" not in str(caught.value)
    with pytest.raises(DecantError, match="no complete train split"):
        CorpusSplit(params.paths.corpus, "train")


@pytest.mark.parametrize("fault", ["absent", "broken", "empty", "column"])
def test_a_source_that_fails_leaves_the_old_corpus(
    fault: str, tiny_corpus: Params, tmp_path: Path
) -> None:
    before = {split: CorpusSplit(tiny_corpus.paths.corpus, split).info for split in SPLITS}
    (tmp_path / "broken.jsonl").write_text('{"text": "unfinished')
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    files = {"paths": [str(tmp_path / f"{fault}.jsonl")], "column": "text"}
    if fault == "column":
        files = dict(tiny_corpus.corpus.files) | {"column": "body"}
    params = change(tiny_corpus, corpus={"files": files})
    with pytest.raises(DecantError):
        build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    for split in SPLITS:
        corpus = CorpusSplit(params.paths.corpus, split)
        assert corpus.info == before[split]
        assert chain_rows(corpus.rows(0, len(corpus))) == before[split].sha256


def test_a_corpus_that_is_begun_no_longer_exists(tiny_corpus: Params) -> None:
    """Between the first rows of the new one and its commit there is neither the old nor the new."""
    address = tiny_corpus.paths.corpus
    old = CorpusSplit(address, "train")
    rows = old.rows(0, 3)
    writer = SplitWriter(address, "train", row_length=32, vocab_size=300)
    CorpusSplit(address, "train")  # still there
    writer.add(rows)
    with pytest.raises(DecantError, match="no complete train split"):
        CorpusSplit(address, "train")
    writer.commit(num_text_bytes=1, tokenizer_sha256="0" * 64)
    assert np.array_equal(CorpusSplit(address, "train").rows(0, 3).tokens, rows.tokens)


def test_a_cache_is_no_corpus_and_not_written_over(tiny_cache: Params) -> None:
    logits = str(tiny_cache.paths.logits)
    params = change(tiny_cache, paths={"corpus": logits})
    with pytest.raises(
        MismatchError, match=r"train is not a corpus .* set paths\.corpus"
    ) as caught:
        CorpusSplit(params.paths.corpus, "train")
    assert "\n" not in str(caught.value)
    with pytest.raises(
        MismatchError, match=r"holds other output of Decant's \(logits\), not corpus"
    ):
        build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    open_cache(tiny_cache).top_k(np.array([0]))


def test_a_damaged_corpus_is_written_over(tiny_corpus: Params) -> None:
    (tiny_corpus.paths.corpus / "train" / "zarr.json").write_text("{")  # type: ignore[operator]
    build_corpus(tiny_corpus.corpus, tiny_corpus.paths.teacher, tiny_corpus.paths.corpus)
    assert len(CorpusSplit(tiny_corpus.paths.corpus, "train")) == 94


def test_hash_of_rows_is_as_specified() -> None:
    rows = Rows(
        tokens=np.array([[1, 2], [3, 70_000]]),
        doc_ids=np.array([[0, 0], [1, PADDING]], dtype=np.int32),
        in_loss=np.array([[False, True], [True, False]]),
    )
    first = struct.pack("<2I2i2B", 1, 2, 0, 0, 0, 1)
    second = struct.pack("<2I2i2B", 3, 70_000, 1, PADDING, 1, 0)
    assert hash_rows(rows) == hashlib.sha256(first + second).hexdigest()
    flipped = Rows(rows.tokens, rows.doc_ids, ~rows.in_loss)
    assert hash_rows(flipped) != hash_rows(rows)
    chain = hashlib.sha256(hashlib.sha256(bytes(32) + first).digest() + second).hexdigest()
    assert chain_rows(rows) == chain
    assert chain_rows(rows[1:], chain_rows(rows[:1])) == chain


def test_hub_out_of_reach_is_one_sentence(
    tiny_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def unreachable(*args: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach the hub\n(no route)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    params = change(tiny_params, corpus={"source": "hub"})
    with pytest.raises(DecantError, match=r"wikimedia/wikipedia .* \(no route\)") as caught:
        build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    assert "\n" not in str(caught.value)


@pytest.mark.network
def test_hub_corpus_is_streamed(tiny_params: Params) -> None:
    params = change(tiny_params, corpus={"source": "hub"})
    infos = build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    assert infos["train"].num_tokens == 3000


def with_bos(folder: Path, *, puts_it: bool) -> Path:
    """A teacher's folder whose tokenizer has a BOS token, and perhaps puts it before each text."""
    tokenizer = Tokenizer.from_file(str(make_teacher(folder) / "tokenizer.json"))
    tokenizer.add_special_tokens(["<bos>"])
    if puts_it:
        ids = [("<bos>", tokenizer.token_to_id("<bos>"))]
        tokenizer.post_processor = TemplateProcessing("<bos> $A", "<bos> $A $B", ids)  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<bos>"
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("puts_it", "add_bos", "expected"),
    [
        (True, "auto", True),
        (True, True, True),
        (True, False, False),
        (False, "auto", False),
        (False, True, True),
        (False, False, False),
    ],
)
def test_texts_begin_as_the_tokenizer_has_it(
    puts_it: bool,
    add_bos: object,
    expected: bool,
    tiny_params: Params,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher = with_bos(tmp_path / "with_bos", puts_it=puts_it)
    changes = {"add_bos": add_bos, "max_document_tokens": 30, "validation_tokens": 60}
    params = change(tiny_params, paths={"teacher": str(teacher)}, corpus=changes)
    infos = build_corpus(params.corpus, teacher, params.paths.corpus)
    assert infos["validation"].num_text_bytes < 60 * 20
    tokenizer = load_tokenizer(teacher)
    for text in documents_of(params, "train")[:-1]:
        assert text.count("<bos>") == text.startswith("<bos>") == expected
        ids = tokenizer(text.removeprefix("<bos>"), add_special_tokens=False)["input_ids"]
        assert len(ids) == 30 - expected
    bytes_of = [len(t.removeprefix("<bos>").encode()) for t in documents_of(params, "validation")]
    assert sum(bytes_of) == infos["validation"].num_text_bytes
    bos = tokenizer.bos_token_id
    assert infos["train"].leading_ids == ((bos,) if expected else ())  # recorded and shown
    said = capsys.readouterr().out
    shown = "<bos>" if expected else "no BOS token"
    assert f"texts begin with {shown} (corpus.add_bos={str(add_bos).lower()})" in said
    assert ("warning: the tokenizer begins texts with" in said) == (expected != puts_it)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_continued_document_begins_with_no_second_bos(
    packing: str, tiny_params: Params, tmp_path: Path
) -> None:
    teacher = with_bos(tmp_path / "with_bos", puts_it=True)
    changes = {"packing": packing, "train_tokens": None, "max_document_tokens": None}
    params = change(tiny_params, paths={"teacher": str(teacher)}, corpus=changes)
    infos = build_corpus(params.corpus, teacher, params.paths.corpus)
    corpus = CorpusSplit(params.paths.corpus, "train")
    rows = corpus.rows(0, len(corpus))
    (bos,) = infos["train"].leading_ids
    found: dict[int, int] = {}
    pieces = 0
    for tokens, doc_ids in zip(rows.tokens, rows.doc_ids, strict=True):
        for number in np.unique(doc_ids[doc_ids >= 0]):
            piece = tokens[doc_ids == number]
            assert bos not in piece[1:]
            found[number] = found.get(number, 0) + int(piece[0] == bos)
            pieces += 1
    assert pieces > len(found) == infos["train"].num_documents  # some are longer than a row
    assert set(found.values()) == {1}
    without = change(params, corpus={"add_bos": False})
    assert build_corpus(without.corpus, teacher, params.paths.corpus)["train"].sha256 != (
        infos["train"].sha256
    )


def test_chats_keep_the_bos_of_their_template(
    tiny_params: Params, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer puts one before each text; a template that writes it must not double it."""
    teacher = with_bos(tmp_path / "with_bos", puts_it=True)
    turn = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    chats = tmp_path / "chats.jsonl"
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"{n}?"},
                {"role": "assistant", "content": "Yes"},
            ]
        }
        for n in range(60)
    ]
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for template, wanted in (("{{ bos_token }}" + turn, 1), (turn, 0)):
        (teacher / "chat_template.jinja").write_text(template)
        files = {"paths": [str(chats)], "column": "messages"}
        changes = {"files": files, "train_tokens": None, "packing": "best_fit"}
        params = change(tiny_params, paths={"teacher": str(teacher)}, corpus=changes)
        build_corpus(params.corpus, teacher, params.paths.corpus)
        documents = documents_of(params, "train")
        assert {text.count("<bos>") for text in documents} == {wanted}
        assert all(text.startswith("<bos>") for text in documents) == bool(wanted)
    assert "texts begin with" not in capsys.readouterr().out  # there are none


def test_a_bos_that_the_tokenizer_lacks_is_refused(tiny_params: Params) -> None:
    params = change(tiny_params, corpus={"add_bos": True})
    with pytest.raises(ParamsError, match="names no bos_token: set it to auto or false"):
        build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)


def test_what_limits_leave_out_is_said(
    tiny_params: Params, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_corpus(tiny_params.corpus, tiny_params.paths.teacher, tiny_params.paths.corpus)
    total = (text_folder / "documents.jsonl").stat().st_size / 1000
    said = capsys.readouterr().out
    full = re.findall(
        r"(\w+) is full at corpus\.(\w+)_tokens=([\d,]+) after (\d+) documents, "
        r"([\d.]+) kB into the source's ([\d.]+) kB; those that follow are left out",
        said,
    )
    assert [line[:3] for line in full] == [
        ("train", "train", "3,000"),
        ("validation", "validation", "600"),
    ]
    for split, *_, read, whole in full:
        lines = (text_folder / "documents.jsonl").read_text().splitlines(keepends=True)
        last = documents_of(tiny_params, split)[-1][:8]  # "Note 37:", of which there is one
        place = next(i for i, line in enumerate(lines) if f'"{last}' in line)
        assert float(read) == pytest.approx(len("".join(lines[: place + 1])) / 1000, rel=0.01)
        assert float(whole) == pytest.approx(total, rel=0.01)
    assert "max_document_tokens" not in said
    params = change(
        tiny_params,
        corpus={"max_document_tokens": 40, "train_tokens": None, "validation_tokens": 10**6},
    )
    build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    said = capsys.readouterr().out
    assert "is full" not in said
    cut = dict(re.findall(r"(\d+) of \d+ documents of (\w+) are cut at corpus\.max_doc", said))
    for number, split in cut.items():
        ends = [text.endswith("<|endoftext|>") for text in documents_of(params, split)]
        assert int(number) == ends.count(False) > 0


def test_duplicates_are_said(
    tiny_params: Params, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "twice.jsonl"
    texts = [f"document number {i}" for i in range(40)] * 2
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    files = {"paths": [str(file)], "column": "text"}
    params = change(tiny_params, corpus={"files": files, "validation_tokens": 10**6})
    build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    said = re.findall(r"(\d+) exact duplicates are left out of", capsys.readouterr().out)
    assert sum(map(int, said)) == 40


def bad_rows(tmp_path: Path, tiny_params: Params, limit: int) -> Params:
    """Sixty texts, with three among them that cannot be read."""
    rows = [json.dumps({"text": f"this is document number {i}"}) for i in range(60)]
    rows[3], rows[20], rows[40] = '{"text": ', '{"text": 7}', '{"text": "half \\ud83d of one"}'
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    files = {"paths": [str(tmp_path / "rows.jsonl")], "column": "text"}
    changes = {"files": files, "max_bad_documents": limit, "train_tokens": None}
    return change(tiny_params, corpus=changes | {"validation_tokens": 10**6})


def test_bad_documents_are_left_out_and_named(
    tiny_params: Params, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = bad_rows(tmp_path, tiny_params, 3)
    infos = build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    assert sum(info.num_documents for info in infos.values()) == 57
    said = capsys.readouterr().out
    assert "corpus: 3 documents cannot be used and are left out:" in said
    for row, reason in ((4, "as JSON"), (21, "'7', neither text"), (41, "surrogate")):
        assert re.search(rf"rows\.jsonl, row {row}: .*{reason}", said)


@pytest.mark.parametrize("limit", [0, 2])
def test_more_bad_documents_than_allowed_stop_the_stage(
    limit: int, tiny_params: Params, tmp_path: Path
) -> None:
    params = bad_rows(tmp_path, tiny_params, limit)
    with pytest.raises(DecantError, match=r"rows\.jsonl, row 4: it cannot be read") as caught:
        build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    assert f"more than corpus.max_bad_documents={limit}: correct or drop them" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_of_a_long_document_the_beginning_is_tokenized(
    tiny_params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [" ".join(make_sentences(40, seed)) for seed in range(20)]
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    files = {"paths": [str(tmp_path / "long.jsonl")], "column": "text"}
    changes = {"files": files, "train_tokens": None, "validation_tokens": 10**6}
    params = change(tiny_params, corpus=changes | {"max_document_tokens": 50})
    seen = []
    call = PreTrainedTokenizerFast.__call__

    def counting(self: Any, text: Any, *args: Any, **options: Any) -> Any:
        seen.append(max(map(len, [text] if isinstance(text, str) else text)))
        return call(self, text, *args, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counting)
    build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    assert max(seen) < 500 < 5000 < min(map(len, texts))
    monkeypatch.undo()
    found = {text for split in SPLITS for text in documents_of(params, split)}
    tokenizer = load_tokenizer(params.paths.teacher)
    assert found == {tokenizer.decode(tokenizer(text)["input_ids"][:50]) for text in texts}
