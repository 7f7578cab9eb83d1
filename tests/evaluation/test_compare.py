"""Any model folder, judged: against float64 logits of each document alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pipeline.config.params import Params
from pipeline.data.corpus import build_corpus
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import IGNORE, next_token_labels
from pipeline.errors import DecantError, MismatchError
from pipeline.evaluation.models import ProductModel, WholeModel, open_models
from pipeline.model.decoder import ModelConfig, StudentModel
from pipeline.model.weights import save_student
from tests.helpers import SMALL, change, judge
from tests.models import VOCABULARY_ROWS, make_teacher, make_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY_ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "gpt_neox": SHAPE,
    "gemma3_text": SHAPE
    | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": SHAPE,  # a bias on the logits
    "gemma2": SHAPE | {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "cohere": SHAPE | {"logit_scale": 0.5},
    "bloom": {"vocab_size": VOCABULARY_ROWS, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}
WHOLE = {"phi"}


def make_model(folder: Path, kind: str, teacher: Path) -> Path:
    """A random model with the teacher's tokenizer."""
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**KINDS[kind]))
    with torch.no_grad():  # biases and norms start at 0 and 1, which would hide mistakes
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(teacher / name, folder / name)
    return folder


def documents_of(corpus: CorpusSplit) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and labels of each document, of each row."""
    rows = corpus.rows(0, len(corpus))
    tokens, doc_ids = torch.from_numpy(rows.tokens), torch.from_numpy(rows.doc_ids)
    labels = next_token_labels(tokens, doc_ids, torch.from_numpy(rows.in_loss))
    for row in range(len(corpus)):
        for number in doc_ids[row].unique().tolist():
            place = doc_ids[row] == number
            if number >= 0:
                yield tokens[row][place], labels[row][place]


def exact_log_probabilities(folder: Path, corpus: CorpusSplit) -> tuple[torch.Tensor, torch.Tensor]:
    """By transformers in float64, each document by itself: [n, V], and the labels [n]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    parts, targets = [], []
    with torch.no_grad():
        for tokens, labels in documents_of(corpus):
            wanted = labels != IGNORE
            logits = model(tokens[None], use_cache=False).logits[0]
            parts.append(logits[wanted].double())
            targets.append(labels[wanted])
    return torch.cat(parts), torch.cat(targets)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bloom"])
def test_any_architecture_against_float64(kind: str, tiny_corpus: Params, tmp_path: Path) -> None:
    teacher = tiny_corpus.paths.teacher
    folder = make_model(tmp_path / kind, kind, teacher)
    found = judge(tiny_corpus, {"it": folder})
    corpus = CorpusSplit(tiny_corpus.paths.corpus, "validation")
    logits, labels = exact_log_probabilities(folder, corpus)
    log_q = logits.log_softmax(-1)
    log_p = exact_log_probabilities(teacher, corpus)[0][:, :300].log_softmax(-1)
    divergences = (log_p.exp() * (log_p - log_q[:, :300])).sum(-1).numpy()
    scores = found.scores["it"]
    assert scores.tokens == len(labels)
    assert scores.loss == pytest.approx(
        float(torch.nn.functional.nll_loss(log_q, labels)), rel=1e-5
    )
    assert scores.kl_to_teacher == scores.kl.mean == pytest.approx(divergences.mean(), rel=1e-5)
    expected = np.quantile(divergences, [0.5, 0.9, 0.95, 0.99, 1.0])
    names = ("median", "p90", "p95", "p99", "max")
    assert [getattr(scores.kl, name) for name in names] == pytest.approx(expected, rel=1e-4)
    accuracy = float((log_q.argmax(-1) == labels).double().mean())
    assert scores.accuracy == pytest.approx(accuracy, abs=2e-3)
    agreement = float((log_q.argmax(-1) == log_p.argmax(-1)).double().mean())
    assert scores.top1_agreement == pytest.approx(agreement, abs=2e-3)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert found.parameters["it"] == theirs.num_parameters()
    for name, interval in scores.interval.items():
        assert interval.low <= getattr(scores, name) <= interval.high
    (model,) = open_models(
        {"it": folder}, corpus, teacher, dtypes={"it": torch.float32}, device=torch.device("cpu")
    ).values()
    assert isinstance(model, WholeModel if kind in WHOLE else ProductModel)


def test_the_teacher_against_itself(tiny_corpus: Params, tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "exact", vocab_size=300)  # no rows beyond the tokenizer's ids
    found = judge(change(tiny_corpus, paths={"teacher": str(folder)}), {"itself": folder})
    teacher, itself = found.scores["teacher"], found.scores["itself"]
    assert itself.kl.max < 1e-5
    assert itself.top1_agreement == 1.0
    assert itself.loss == pytest.approx(teacher.loss, rel=1e-6)
    assert asdict(teacher.kl) == dict.fromkeys(asdict(teacher.kl), 0.0)
    assert teacher.interval.keys() == {"loss", "top1_agreement", "accuracy"}
    assert found.parameters["itself"] == found.parameters["teacher"]


def test_differences_are_of_the_first_model_to_each_other(
    tiny_corpus: Params, tmp_path: Path
) -> None:
    near = tiny_corpus.paths.teacher
    far = make_teacher(tmp_path / "far", seed=5)
    found = judge(tiny_corpus, {"near": near, "far": far, "again": near})
    documents = CorpusSplit(tiny_corpus.paths.corpus, "validation").info.num_documents
    assert found.resampled == f"{documents} documents"
    assert list(found.differences) == ["far", "again"]
    kl = found.differences["far"]["kl_to_teacher"]
    gap = found.scores["near"].kl_to_teacher - found.scores["far"].kl_to_teacher
    assert kl.low < gap < kl.high < 0.0
    for interval in found.differences["again"].values():
        assert (interval.low, interval.high) == (0.0, 0.0)


def test_one_document_is_resampled_by_rows(tiny_corpus: Params, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text("the cat sees a river. " * 120)
    (tmp_path / "other.txt").write_text("the tower keeps a cache. " * 120)
    source = {"files": {"paths": [str(tmp_path / "*.txt")], "column": "text"}}
    params = change(tiny_corpus, corpus=source | {"validation_fraction": 0.5})
    build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    corpus = CorpusSplit(params.paths.corpus, "validation")
    assert corpus.info.num_documents == 1
    found = judge(params, {"it": params.paths.teacher})
    assert found.resampled == f"{len(corpus)} rows"
    assert found.scores["it"].interval["loss"].half_width > 0.0


def test_nothing_in_the_loss_is_one_sentence(
    tiny_corpus: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pipeline.evaluation.compare.row_labels",
        lambda rows: torch.full(rows.tokens.shape, IGNORE),
    )
    with pytest.raises(DecantError, match="no token of the corpus's validation rows is in the"):
        judge(tiny_corpus, {"it": tiny_corpus.paths.teacher})


def test_a_model_that_has_diverged_is_named(tiny_corpus: Params, tmp_path: Path) -> None:
    student = StudentModel(ModelConfig(**SMALL))
    with torch.no_grad():
        student.head_weight[3] = torch.nan
    save_student(student, tmp_path / "it", tokenizer_from=tiny_corpus.paths.teacher)
    with pytest.raises(DecantError, match="it predicts probabilities that are 0 or not numbers"):
        judge(tiny_corpus, {"fine": tiny_corpus.paths.teacher, "it": tmp_path / "it"})


def test_models_that_do_not_fit_the_corpus_are_refused(tiny_corpus: Params, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_teacher(other)
    make_tokenizer(other, vocab_size=280)
    with pytest.raises(MismatchError, match="another vocabulary than the corpus: id 280 is None"):
        judge(tiny_corpus, {"it": other})
    for shape, message in (
        ({"vocab_size": 290}, "has 290 vocabulary rows for the corpus's 300 ids"),
        ({"max_seq_len": 16}, "reads up to 16 tokens, fewer than the corpus's rows of 32"),
    ):
        folder = tmp_path / str(*shape)
        student = StudentModel(ModelConfig(**(SMALL | shape)))
        save_student(student, folder, tokenizer_from=tiny_corpus.paths.teacher)
        with pytest.raises(MismatchError, match=message):
            judge(tiny_corpus, {"it": folder})


def test_a_model_that_mixes_documents_is_refused(tiny_corpus: Params, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "bloom", "bloom", tiny_corpus.paths.teacher)
    with pytest.raises(DecantError, match="'bloom' student always attends across documents"):
        judge(tiny_corpus, {"it": folder})
    whole = WholeModel(folder, torch.float32, torch.device("cpu"))
    tokens = torch.arange(8)[None]
    assert whole.logits(whole.states(tokens, None)).shape == (8, VOCABULARY_ROWS)
    with pytest.raises(
        DecantError, match=r"'bloom' model always attends .* prepare\.document_mask=false"
    ):
        whole.states(tokens, torch.tensor([[0] * 4 + [1] * 4]))
    packed = change(tiny_corpus, prepare={"document_mask": False})
    assert judge(packed, {"it": folder}).scores["it"].loss > 0.0


def drop_tensor_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_config(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": "unheard_of"}))


@pytest.mark.parametrize("damage", [drop_tensor_index, cut_config])
def test_damaged_folders_are_one_sentence(
    damage: Callable[[Path], None], tiny_corpus: Params, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "it", "phi", tiny_corpus.paths.teacher)
    damage(folder)
    with pytest.raises(DecantError, match="is not a usable student"):
        judge(tiny_corpus, {"it": folder})
