"""A capture of DistillKit becomes a corpus and a cache that verify and train take."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.capture.capture import open_captures
from pipeline.config.params import Params
from pipeline.data.corpus_zarr import SPLITS, CorpusSplit
from pipeline.data.packing import Document, document_places, positions_in_loss
from pipeline.errors import DecantError, MismatchError, ParamsError
from pipeline.export.card import data_line
from pipeline.export.dataset_card import dataset_card
from pipeline.export.shared_files import open_whole
from pipeline.integrations.cache_dataset import CacheDataset, collate, model_inputs
from pipeline.integrations.kd_loss import sparse_kd_loss
from pipeline.interchange import import_cache
from pipeline.interchange.distillkit import Cleaned, DistillKitCapture, Targets, clean
from pipeline.interchange.hf_dataset import plain_table
from pipeline.interchange.import_cache import Imported, import_capture
from pipeline.interchange.imported_corpus import Choice
from pipeline.io.checked_json import DamagedError
from pipeline.report import page
from pipeline.training.run import run_training
from tests.helpers import change, from_folder, gate, open_cache
from tests.interchange.captures import LONGEST, K, Sequence, capture_of, import_params, sequences_of
from tests.interchange.distillkit_writer import (
    COMPRESSION,
    LEGACY,
    TYPES,
    columns_of,
    write_capture,
)
from tests.models import make_teacher, make_tokenizer


@pytest.fixture(scope="module")
def sequences(teacher_folder: Path) -> list[Sequence]:
    return sequences_of(teacher_folder)


def import_from(folder: Path, params: Params, **options: Any) -> Imported:
    return import_capture(params, DistillKitCapture([folder], None), **options)


def stored_documents(params: Params) -> dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]]:
    """The ids and log-probabilities that a cache stores of each document, by its tokens."""
    found = {}
    for split in SPLITS:
        reader = open_cache(params, split)
        corpus = reader.corpus
        topk = reader.top_k(np.arange(len(corpus)))
        rows = corpus.rows(0, len(corpus))
        assert torch.equal(topk.has_target, positions_in_loss(rows))
        for row, doc_ids in enumerate(rows.doc_ids):
            for _, place in document_places(doc_ids):
                inside = slice(place.start, place.stop - 1)
                found[tuple(rows.tokens[row, place].tolist())] = (
                    topk.ids[row, inside].numpy(),
                    topk.logprobs[row, inside].numpy(),
                )
    return found


def assert_stored(params: Params, sequences: list[Sequence], longest: int = LONGEST) -> None:
    stored = stored_documents(params)
    assert len(stored) == len(sequences)
    for one in sequences:
        ids, logprobs = stored[tuple(one.tokens[:longest])]
        np.testing.assert_array_equal(ids, one.ids[: longest - 1])
        np.testing.assert_array_equal(logprobs, one.logprobs[: longest - 1].astype(np.float16))


def as_float32(sequences: list[Sequence]) -> list[Sequence]:
    """The numbers as float32 holds them."""
    return [replace(s, logprobs=s.logprobs.astype(np.float32)) for s in sequences]


@pytest.mark.parametrize("about", [COMPRESSION, None], ids=["compressed", "raw"])
def test_every_document_has_its_targets(
    about: dict[str, Any] | None, sequences: list[Sequence], tiny_params: Params, tmp_path: Path
) -> None:
    params = import_params(tiny_params)
    folder = capture_of(tmp_path / "capture", sequences, about)
    found = import_from(folder, params)
    assert_stored(params, as_float32(sequences))
    assert found.cleaned.divided == found.cleaned.beyond == 0
    corpora = [CorpusSplit(params.paths.corpus, split) for split in SPLITS]
    assert sum(c.info.num_tokens for c in corpora) == sum(len(s.tokens) for s in sequences)
    assert sum(c.info.num_documents for c in corpora) == len(sequences)
    text_bytes = sum(c.info.num_text_bytes for c in corpora)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    assert text_bytes == sum(len(tokenizer.decode(s.tokens).encode()) for s in sequences)


def test_packed_rows_in_the_legacy_form(
    sequences: list[Sequence], tiny_params: Params, tmp_path: Path
) -> None:
    """As `distillkit-pack-logits` writes them: arrow, sequences numbered, no last tokens."""
    half = [
        replace(s, logprobs=s.logprobs.astype(np.float16).astype(np.float64)) for s in sequences
    ]
    rows = []
    for start in range(0, len(half), 3):
        some = half[start : start + 3]
        row: dict[str, Any] = {"input_ids": [t for s in some for t in s.tokens[:-1]]}
        row["attention_mask"] = [i + 1 for i, s in enumerate(some) for _ in s.tokens[:-1]]
        row["labels"] = row["input_ids"]
        for one in some:
            for name, values in columns_of(one.ids, one.logprobs, LEGACY)[0].items():
                row.setdefault(name, []).extend(values)
        row["input_ids"], row["labels"] = row["input_ids"] + [5, 5], row["labels"] + [-100, -100]
        row["attention_mask"] = row["attention_mask"] + [0, 0]  # padding
        for name in ("packed_indices", "exact_values", "coeffs"):
            row[name] = row[name] + row[name][:2]
        rows.append(row)
    features = datasets.Features.from_arrow_schema(
        datasets.arrow_dataset.pa.schema([(name, TYPES[name]) for name in rows[0]])
    )
    folder = tmp_path / "packed"
    datasets.Dataset.from_list(rows, features=features).save_to_disk(folder)
    config = tmp_path / "train.yaml"
    config.write_text(f"teacher: {{legacy_logit_compression: {LEGACY}}}")
    params = import_params(tiny_params)
    import_capture(params, DistillKitCapture([folder], config))
    short = [
        replace(s, tokens=s.tokens[:-1], ids=s.ids[:-1], logprobs=s.logprobs[:-1]) for s in half
    ]
    assert_stored(params, short)


def test_the_gate_judges_an_imported_cache(
    sequences: list[Sequence], tiny_params: Params, tmp_path: Path
) -> None:
    """By probabilities alone; a shift by one token is found, as is another teacher."""
    params = import_params(tiny_params)
    import_from(capture_of(tmp_path / "capture", sequences), params)
    report = gate(params)
    assert report.passed, report.failures
    assert report.cache.lse_error is None
    assert report.cache.entropy_error is None
    assert report.cache.mean_kl is not None
    assert report.cache.mean_kl < 1e-5
    assert {"lse", "entropy"}.isdisjoint(report.limits.errors)
    assert "lse" not in str(report.cache)
    assert "KL" in str(report.found)
    rewritten = import_params(tiny_params)
    shifted = [
        replace(s, ids=np.roll(s.ids, 1, 0), logprobs=np.roll(s.logprobs, 1, 0)) for s in sequences
    ]
    folder = capture_of(tmp_path / "shifted", shifted)
    import_from(folder, rewritten, overwrite=True)
    assert not gate(rewritten).passed


def test_the_error_of_a_compression_is_judged_by_the_ceilings(
    sequences: list[Sequence], tiny_params: Params, tmp_path: Path
) -> None:
    """It is more than the noise of a teacher in float32, and the limits of verify.* allow it."""
    params = import_params(tiny_params)
    about = COMPRESSION | {"exact_k": 4, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, 2]}
    import_from(capture_of(tmp_path / "capture", sequences, about), params)
    strict, lenient = gate(params), gate(change(params, verify={"noise_factor": 1e6}))
    assert not strict.passed
    assert lenient.passed, lenient.failures
    assert lenient.limits.errors["kl"].mean == params.verify.max_mean_kl
    assert lenient.cache.mean_kl is not None
    assert 1e-5 < lenient.cache.mean_kl < 1e-3


def test_the_card_and_the_report_name_no_teacher(
    sequences: list[Sequence], tiny_params: Params, tmp_path: Path
) -> None:
    """That of params.yaml need not be the one that was captured, nor its licence."""
    teacher = shutil.copytree(tiny_params.paths.teacher, tmp_path / "licensed")
    (teacher / "README.md").write_text("---\nlicense: mit\n---\n")
    params = change(import_params(tiny_params), paths={"teacher": str(teacher)})
    import_from(capture_of(tmp_path / "capture", sequences), params)
    card = dataset_card(params, [open_cache(params, s) for s in SPLITS], {}, "org/name", None)
    assert "log-probabilities, imported from distillkit for the distillation" in card
    assert "| teacher | not recorded, imported from distillkit |" in card
    assert "| text | unrecorded text, imported from distillkit |" in card
    assert "| fingerprint: imported_from | distillkit |" in card
    for wrong in (data_line(params), "licence mit", "captured by Decant"):
        assert wrong not in card
    said = page._provenance(params)
    assert said["teacher"] == "an unrecorded teacher"
    assert said["text"] == "unrecorded text, imported from distillkit"


def test_nothing_is_said_of_the_full_row(
    sequences: list[Sequence], tiny_params: Params, tmp_path: Path
) -> None:
    params = import_params(tiny_params)
    import_from(capture_of(tmp_path / "capture", sequences), params)
    reader = open_cache(params)
    made_from = reader.fingerprint
    assert made_from.imported_from == made_from.engine == "distillkit"
    assert made_from.dtype == "unknown"
    assert made_from.document_mask
    topk = reader.top_k(np.array([0]))
    assert not topk.has_row_sums
    assert bool(topk.lse.isnan().all())
    assert bool(topk.entropy.isnan().all())
    columns = plain_table(reader.corpus.rows(0, 1), topk)
    assert columns.keys() == {"input_ids", "labels", "doc_ids", "teacher_ids", "teacher_logprobs"}
    with pytest.raises(MismatchError, match="temperature=2 is not among"):
        topk.target(2.0)
    with pytest.raises(MismatchError, match="temperature=2 is not among"):
        run_training(change(params, train={"temperature": 2.0}), "warm")


def test_one_step_by_hand(sequences: list[Sequence], tiny_params: Params, tmp_path: Path) -> None:
    """The first losses of a run equal those computed in float64 from what the teacher said."""
    params = import_params(tiny_params)
    import_from(capture_of(tmp_path / "capture", sequences), params)
    start = make_teacher(tmp_path / "start", seed=3, num_hidden_layers=2)
    train = {"steps": 1, "warmup_steps": 0, "alpha": 0.6, "temperature": 1.0, "eval_every": 1}
    corpus = CorpusSplit(params.paths.corpus, "train")
    train |= {"batch_rows": len(corpus)}
    state = run_training(from_folder(change(params, train=train), start), "by-hand").state
    assert state is not None
    step = next(values for values in state.history if "train/loss" in values)
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float64).eval()
    in_train = {
        tuple(corpus.rows(row, row + 1).tokens[0, place].tolist())
        for row in range(len(corpus))
        for _, place in document_places(corpus.rows(row, row + 1).doc_ids[0])
    }
    divergence, ce, count = 0.0, 0.0, 0
    for one in sequences:
        if tuple(one.tokens) not in in_train:
            continue
        with torch.no_grad():
            log_q = model(torch.tensor([one.tokens])).logits[0, :-1].log_softmax(-1)
        log_p = torch.from_numpy(one.logprobs.astype(np.float16).astype(np.float64))
        log_q_kept = log_q.gather(-1, torch.from_numpy(one.ids))
        p_tail, q_tail = 1 - log_p.exp().sum(-1), 1 - log_q_kept.exp().sum(-1)
        kept = (log_p.exp() * (log_p - log_q_kept)).sum(-1)
        divergence += float((kept + p_tail * (p_tail / q_tail).log()).sum())
        labels = torch.tensor(one.tokens[1:])
        ce -= float(log_q.gather(-1, labels[:, None]).sum())
        count += len(labels)
    assert step["train/divergence"] == pytest.approx(divergence / count, rel=1e-5)
    assert step["train/ce"] == pytest.approx(ce / count, rel=1e-5)
    expected = (0.6 * divergence + 0.4 * ce) / count
    assert step["train/loss"] == pytest.approx(expected, rel=1e-5)
    rows = CacheDataset(str(params.paths.corpus), str(params.paths.logits))
    batch = collate(list(rows))
    assert not {"teacher_lse", "teacher_entropy"} & batch.keys()
    logits = model.float()(**model_inputs(batch)).logits
    assert sparse_kd_loss(logits, batch, alpha=0.6).item() == pytest.approx(expected, rel=1e-5)


def test_documents_are_cut_and_limited_as_by_the_corpus(
    sequences: list[Sequence],
    tiny_params: Params,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = capture_of(tmp_path / "capture", sequences)
    params = import_params(tiny_params, row_length=32)
    with pytest.raises(ParamsError, match=r"corpus\.row_length=32: raise that"):
        import_from(folder, params)
    params = import_params(tiny_params, row_length=32, max_document_tokens=32)
    import_from(folder, params, k=5)
    five = [replace(s, ids=s.ids[:, :5], logprobs=s.logprobs[:, :5]) for s in sequences]
    assert_stored(params, as_float32(five), longest=32)
    assert "are cut at corpus.max_document_tokens=32" in capsys.readouterr().out
    few = import_params(tiny_params, train_tokens=200, validation_tokens=90)
    import_from(folder, few, overwrite=True)
    infos = [CorpusSplit(few.paths.corpus, split).info for split in SPLITS]
    assert [info.num_tokens for info in infos] == [200, 90]
    assert "train is full at corpus.train_tokens=200" in capsys.readouterr().out


def test_a_split_with_room_for_one_token_is_full(tiny_params: Params, tmp_path: Path) -> None:
    """A single token has no target: what follows is not read, nor called a loss."""
    corpus = import_params(tiny_params, train_tokens=6, validation_fraction=1e-9).corpus
    choice = Choice(corpus, "train", 300, tmp_path)
    five = Document(np.arange(5), np.ones(5, np.bool_))
    assert choice.take("row 0", five) is not None
    assert choice.is_full
    assert choice.take("row 1", five) is None
    assert choice.num_dropped == 0


def test_an_interrupted_import_goes_on(
    sequences: list[Sequence],
    tiny_params: Params,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = import_params(tiny_params)
    folder = capture_of(tmp_path / "capture", sequences)
    whole = import_from(folder, import_params(tiny_params))
    assert whole.shards_done > 2
    shutil.rmtree(params.paths.logits)
    write, calls = import_cache.CacheWriter.write, iter(range(100))

    def dies(self: Any, *args: Any) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(import_cache.CacheWriter, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            import_from(folder, params)
    again = import_from(folder, params)
    assert again.shards_done == whole.shards_done - 1
    assert_stored(params, as_float32(sequences))
    assert import_from(folder, params).shards_done == 0


def test_a_damaged_import_is_repaired_as_its_message_says(
    sequences: list[Sequence], tiny_params: Params, tmp_path: Path
) -> None:
    params = import_params(tiny_params)
    folder = capture_of(tmp_path / "capture", sequences)
    import_from(folder, params)
    rows = CorpusSplit(params.paths.corpus, "train").info.sha256
    again = r"run stages/convert\.py --overwrite"
    for file in (
        params.paths.logits / "train" / "id_indices" / "c" / "0" / "0",
        params.paths.corpus / "train" / "tokens" / "c" / "0" / "0",
    ):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        with pytest.raises(DecantError, match=f"damaged .*: {again}"):
            open_whole(params.paths)
        with pytest.raises(DecantError, match=f"damaged .*: {again}"):
            open_cache(params).shard(0)
        import_from(folder, params, overwrite=True)
        assert len(open_whole(params.paths)) == 2
        assert_stored(params, as_float32(sequences))
    assert CorpusSplit(params.paths.corpus, "train").info.sha256 == rows
    (params.paths.logits / "train" / "zarr.json").write_text("{")
    with pytest.raises(DecantError, match=r"prepare.py --repair, or .* if it was imported"):
        open_cache(params)
    import_from(folder, params, overwrite=True)
    assert_stored(params, as_float32(sequences))


def test_what_was_made_otherwise_stays(
    sequences: list[Sequence], tiny_corpus: Params, tmp_path: Path
) -> None:
    """Neither an import nor a capture replaces the other without being told."""
    params = import_params(tiny_corpus)
    folder = capture_of(tmp_path / "capture", sequences)
    with pytest.raises(MismatchError, match=r"made from something else: set paths\.corpus"):
        import_from(folder, params)
    import_from(folder, params, overwrite=True)
    with pytest.raises(MismatchError, match=r"made with k=16, wanted is 5: .* add --overwrite"):
        import_from(folder, params, k=5)
    with pytest.raises(MismatchError, match="imported from distillkit, and no capture replaces it"):
        open_captures(params, overwrite=True)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda row: row.pop("bytepacked_indices"),
            "a capture of DistillKit has input_ids and one",
        ),
        (lambda row: row["input_ids"].append(300), "holds token 300, and the tokenizer of"),
        (
            lambda row: row["compressed_logprobs"].pop(),
            "tokens and .* entries of compressed_logprobs",
        ),
        (lambda row: row.update(labels=row["input_ids"][:-1]), "tokens and .* entries of labels"),
        (
            lambda row: row.update(labels=[t ^ 1 for t in row["input_ids"]]),
            "its label at token 0 is .* where the token is",
        ),
        (
            lambda row: row["bytepacked_indices"].__setitem__(0, [255] * 18),
            "holds id 511 of 300: check --compression",
        ),
        (
            lambda row: row["bytepacked_indices"].__setitem__(0, [0] * 18),
            "holds an id twice: check --compression",
        ),
        (
            lambda row: row["compressed_logprobs"].__setitem__(0, [0, 0, 128, 64] * 16),
            "add up to 874, so its values are logits",
        ),
        (
            lambda row: row["compressed_logprobs"].__setitem__(0, [0, 0, 192, 127] * 16),
            "values that are not numbers",
        ),
    ],
)
def test_a_damaged_capture_is_refused_in_a_sentence(
    spoil: Any, words: str, sequences: list[Sequence], tiny_params: Params, tmp_path: Path
) -> None:
    rows = []
    for one in sequences:
        columns, _ = columns_of(one.ids, one.logprobs, COMPRESSION)
        row = {"input_ids": list(one.tokens), **columns}
        spoil(row)
        rows.append(row)
    folder = write_capture(tmp_path / "capture", rows, COMPRESSION)
    with pytest.raises(DecantError, match=words):
        import_from(folder, import_params(tiny_params))


def test_a_wrong_request_is_refused_in_a_sentence(
    sequences: list[Sequence], tiny_params: Params, tmp_path: Path
) -> None:
    params = import_params(tiny_params)
    folder = capture_of(tmp_path / "capture", sequences)
    with pytest.raises(ParamsError, match="--k 17 exceeds the 16 ids"):
        import_from(folder, params, k=17)
    with pytest.raises(ParamsError, match="does not exist: name a folder"):
        DistillKitCapture([tmp_path / "absent"], None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ParamsError, match=r"holds no \.parquet or \.arrow files"):
        DistillKitCapture([tmp_path / "empty"], None)
    legacy = tmp_path / "legacy.yaml"
    legacy.write_text(str(LEGACY))
    with pytest.raises(ParamsError, match="describes another form of compression"):
        DistillKitCapture([folder], legacy)
    (folder / "compression_config.yaml").unlink()
    with pytest.raises(ParamsError, match="name the capture's configuration by --compression"):
        DistillKitCapture([folder], None)
    (folder / "data_0.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DecantError, match=r"data_0\.parquet cannot be read"):
        DistillKitCapture([folder], legacy)


def test_decoded_values_become_a_distribution() -> None:
    """By hand: sorted; divided where they exceed 1; padding rows of the head left out."""
    half, inf = np.log(0.5), -np.inf
    found = Targets(
        np.array([[7, 3, 5], [1, 2, 3], [9, 4, 6]]),
        np.array([[-3.0, -1.0, -2.0], [half, half, half], [-1.0, inf, -2.0]], np.float32),
    )
    counts = Cleaned()
    cleaned = clean(found, 10, 8, counts)
    assert cleaned.ids.tolist() == [[3, 5, 7], [1, 2, 3], [6, 6, 6]]
    third = np.log(1 / 3)
    expected = [[-1.0, -2.0, -3.0], [third, third, third], [-2.0, inf, inf]]
    np.testing.assert_allclose(cleaned.logprobs, expected, rtol=1e-6)
    assert counts == Cleaned(positions=3, divided=1, beyond=1)
    with pytest.raises(DamagedError, match="holds id 9 of 9"):
        clean(found, 9, 8, Cleaned())
    with pytest.raises(DamagedError, match="keeps no id"):
        clean(Targets(found.ids[2:], found.logprobs[2:]), 10, 4, Cleaned())


def test_unknown_sums_are_zero_on_disk(
    sequences: list[Sequence], tiny_params: Params, tmp_path: Path
) -> None:
    """As pipeline/logit_cache/format.py says; in memory they are NaN."""
    params = import_params(tiny_params)
    import_from(capture_of(tmp_path / "capture", sequences), params)
    reader = open_cache(params)
    arrays = reader.shard(0).arrays
    assert not arrays["lse"].any()
    assert not arrays["entropies"].any()
    assert reader.fingerprint.k == K
