"""verify --against: what a change of the teacher costs, against float64 by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

from pipeline.config.params import Params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import IGNORE, PADDING
from pipeline.errors import DecantError, ParamsError
from pipeline.verify.against import compare_with
from stages.verify import main
from tests.helpers import change
from tests.models import make_qwen_tokenizer, make_teacher

WHOLE = {"batches": 1000, "batch_rows": 2}


def verify(params_file: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["--params", str(params_file), *words])


@torch.no_grad()
def exact_logits(folder: Path, corpus: CorpusSplit) -> tuple[torch.Tensor, torch.Tensor]:
    """By transformers in float64, each document by itself: [n, V]; and each next token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    rows = corpus.rows(0, len(corpus))
    tokens, doc_ids = torch.from_numpy(rows.tokens), torch.from_numpy(rows.doc_ids)
    parts, following = [], []
    for row, numbers in zip(tokens, doc_ids, strict=True):
        for number in numbers.unique().tolist():
            if number == PADDING:
                continue
            document = row[numbers == number]
            logits = model(document[None], use_cache=False).logits[0]
            parts.append(logits[:-1, : corpus.info.vocab_size])
            following += document[1:].tolist()
    return torch.cat(parts), torch.tensor(following)


def test_numbers_against_float64(tiny_corpus: Params, tmp_path: Path) -> None:
    params = change(tiny_corpus, verify=WHOLE)
    other = make_teacher(tmp_path / "other", seed=4)
    report = compare_with(other, params)
    corpus = CorpusSplit(params.paths.corpus, "validation")
    ours, following = exact_logits(params.paths.teacher, corpus)
    log_q = ours.log_softmax(-1)
    log_p = exact_logits(other, corpus)[0].log_softmax(-1)
    assert report.tokens == len(log_q) < corpus.info.num_tokens
    assert report.rows == len(corpus)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert report.kl == pytest.approx(float(kl.mean()), rel=1e-5)
    assert report.max_kl == pytest.approx(float(kl.max()), rel=1e-5)
    assert report.interval["kl"].low < report.kl < report.interval["kl"].high
    same = log_p.argmax(-1) == log_q.argmax(-1)
    assert report.top1 == pytest.approx(float(same.double().mean()), abs=2e-3)
    cosine = torch.nn.functional.cosine_similarity(log_p.exp(), log_q.exp(), dim=-1)
    assert report.cosine == pytest.approx(float(cosine.mean()), rel=1e-5)
    losses = [float(torch.nn.functional.nll_loss(log, following)) for log in (log_q, log_p)]
    assert [report.teacher_loss, report.against_loss] == pytest.approx(losses, rel=1e-5)
    found = report.interval["loss_difference"]
    assert found.low < losses[0] - losses[1] < found.high
    q = log_q.exp().sort(-1, descending=True).values
    tail = q[:, params.prepare.k :]
    mass = tail.sum(-1)
    inside = (mass * torch.special.entr(tail / mass[:, None]).sum(-1)).mean()
    assert report.cut is not None
    assert report.cut.tail_mass == pytest.approx(float(mass.mean()), abs=1e-6)
    assert report.cut.nats_lost == pytest.approx(float(inside), abs=5e-6)
    renormalised = q[:, : params.prepare.k] / (1.0 - mass[:, None])
    divergence = (renormalised * (renormalised / q[:, : params.prepare.k]).log()).sum(-1)
    assert report.cut.renormalised_kl == pytest.approx(float(divergence.mean()), rel=1e-4)


@pytest.mark.parametrize("document_mask", [True, False])
def test_a_model_against_itself_is_zero(document_mask: bool, tiny_corpus: Params) -> None:
    params = change(tiny_corpus, prepare={"document_mask": document_mask, "k": 0, "num_sampled": 4})
    report = compare_with(params.paths.teacher, params)
    assert (report.kl, report.max_kl, report.top1) == (0.0, 0.0, 1.0)
    assert report.cosine == pytest.approx(1.0, abs=1e-6)
    assert report.teacher_loss == report.against_loss
    assert report.cut is None


def test_the_cut_at_a_mass(tiny_corpus: Params) -> None:
    """It leaves out about what it is told to where K is large enough."""
    params = change(tiny_corpus, prepare={"k": 290, "top_p": 0.6}, verify=WHOLE)
    report = compare_with(params.paths.teacher, params)
    assert report.cut is not None
    assert 0.39 < report.cut.tail_mass < 0.4
    assert any("top 290, cut at 0.6, of the teacher" in line for line in report.lines())


def test_no_position_in_the_loss_is_a_sentence(
    tiny_corpus: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pipeline.verify.against.row_labels",
        lambda rows: torch.full(rows.tokens.shape, IGNORE),
    )
    with pytest.raises(DecantError, match="rows has a position in the loss, so there is nothing"):
        compare_with(tiny_corpus.paths.teacher, tiny_corpus)


def test_the_stage_needs_no_cache(tiny_corpus: Params, tmp_path: Path) -> None:
    other = make_teacher(tmp_path / "other", seed=4)
    done = verify(tmp_path / "params.yaml", "--against", str(other), "--set", "verify.batches=3")
    assert done.exit_code == 0, done.output
    written = json.loads((tiny_corpus.paths.verify / "against.json").read_text())
    assert written["batches"] == written["rows"] == 3
    half = (written["interval"]["kl"]["high"] - written["interval"]["kl"]["low"]) / 2
    assert (
        f"KL(against || teacher)   {written['kl']:.6f} ± {half:.6f} nats per token" in done.output
    )
    assert f"top {tiny_corpus.prepare.k} of the teacher" in done.output
    assert "verify: compares a llama of" in done.output
    assert f"{written['tokens']} tokens against {other}" in done.output
    assert not (tiny_corpus.paths.verify / "metrics.json").exists()


@pytest.mark.usefixtures("tiny_corpus")
def test_refusals_are_sentences(tiny_corpus: Params, tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    absent = verify(params, "--against", str(tmp_path / "absent"))
    assert absent.exit_code == ParamsError.exit_code
    assert "holds no config.json: name a model folder" in absent.output
    both = verify(params, "--structure", "--against", str(tmp_path))
    assert "are two checks" in both.output
    foreign = make_teacher(tmp_path / "foreign")
    make_qwen_tokenizer(foreign)
    done = verify(params, "--against", str(foreign))
    assert done.exit_code == 1
    assert "has another vocabulary than the corpus" in done.output
    short = make_teacher(tmp_path / "short", max_position_embeddings=16)
    done = verify(params, "--against", str(short))
    assert "longer than the 16 positions" in done.output
