"""The gate must pass a good cache and fail every bad one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import Params
from pipeline.data.rows import SPLITS, CorpusSplit, hash_rows
from pipeline.fidelity import GateReport, agreement, run_gate
from pipeline.losses.reference import tail_bucket_kl
from pipeline.teacher.hf import HuggingFaceTeacher
from pipeline.topk import TopK, top_k_from_logits
from tests.conftest import change, make_teacher
from tests.helpers import capture_all, live_teacher, make_capture, open_cache


def gate(params: Params, teacher: HuggingFaceTeacher | None = None) -> GateReport:
    splits = [
        (CorpusSplit(params.paths.corpus, split), open_cache(params, split)) for split in SPLITS
    ]
    return run_gate(teacher or live_teacher(params), splits, params.verify, seed=0)


def rewrite(params: Params, change_rows: Callable[[TopK], TopK]) -> None:
    """Commit other contents under good markers, as a defect of ours would have."""
    reader = open_cache(params)
    changed = change_rows(reader.top_k(np.arange(len(reader.corpus))))
    writer = make_capture(params, "train").writer
    for shard in range(writer.layout.num_shards):
        start, stop = writer.layout.rows_of(shard)
        writer.write(shard, changed[start:stop], hash_rows(reader.corpus.rows(start, stop)))


def shifted_by_one(topk: TopK) -> TopK:
    return topk.map(lambda tensor: tensor.roll(1, dims=1))


def test_a_good_cache_passes(tiny_cache: Params) -> None:
    report = gate(tiny_cache)
    assert report.passed, report.failures
    assert report.cache.mean_cosine > 0.9999
    assert report.cache.mean_kl < 1e-5
    assert report.cache.lse_error < 1e-4
    # entropy is stored as float16, of which half a step is 0.002 between 4 and 8 nats
    assert report.cache.normaliser_error < 2e-3
    assert report.batches == 20
    assert report.noise.mean_cosine > 0.9999
    assert report.control.mean_cosine < 0.9
    shares = [row["share"] for row in report.histogram if row["series"] == "cache"]
    assert sum(shares) == pytest.approx(1.0)


def test_shift_by_one_is_caught(tiny_cache: Params) -> None:
    rewrite(tiny_cache, shifted_by_one)
    report = gate(tiny_cache)
    assert not report.passed
    assert any("mean cosine" in failure for failure in report.failures)


def test_a_stale_shard_is_caught(tiny_cache: Params) -> None:
    rewrite(tiny_cache, lambda topk: TopK.cat((topk[:16], topk[32:48], topk[32:])))
    assert not gate(change(tiny_cache, verify={"batches": 100})).passed


@pytest.mark.parametrize(
    ("field", "failure"),
    [("lse", "of lse 0.5"), ("lse_tau", "lse_tau and entropy"), ("entropy", "lse_tau and entropy")],
)
def test_a_wrong_sum_over_the_row_is_caught(field: str, failure: str, tiny_cache: Params) -> None:
    """Probabilities at temperature 1 are all right; targets at other temperatures would not be."""

    def wrong(topk: TopK) -> TopK:
        tensor = getattr(topk, field).clone()
        if field == "lse_tau":
            tensor[..., 1] += 0.6  # one temperature of three
        else:
            tensor += 0.6
        return replace(topk, **{field: tensor})

    rewrite(tiny_cache, wrong)
    (found,) = gate(tiny_cache).failures
    assert failure in found


def test_another_teacher_revision_is_caught(tiny_cache: Params, tmp_path: Path) -> None:
    make_teacher(tmp_path / "other", seed=5)
    other = change(tiny_cache, paths={"teacher": str(tmp_path / "other")})
    assert not gate(tiny_cache, live_teacher(other)).passed


def test_a_slightly_trained_teacher_is_caught(tiny_cache: Params) -> None:
    """A revision that differs by a few percent in its weights."""
    teacher = live_teacher(tiny_cache)
    with torch.no_grad():
        for parameter in teacher.model.parameters():
            parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    assert not gate(tiny_cache, teacher).passed


def test_a_blind_gate_is_a_failure(tiny_cache: Params) -> None:
    loose = {
        "min_mean_cosine": 0.0,
        "min_row_cosine": 0.0,
        "max_mean_kl": 1e6,
        "min_top1": 0.0,
        "min_overlap": 0.0,
        "max_lse_error": 1e6,
        "max_normaliser_error": 1e6,
    }
    report = gate(change(tiny_cache, verify=loose))
    assert report.failures == (
        "the negative control, targets shifted by one, passed: the gate is blind",
    )


def test_bfloat16_cache_passes_with_its_own_noise(tiny_corpus: Params) -> None:
    params = change(tiny_corpus, prepare={"dtype": "bfloat16"})
    capture_all(params)
    assert gate(params).passed


def test_the_gate_attends_as_the_cache_did(tiny_cache: Params) -> None:
    """And catches a cache of packed rows that claims to be one of documents kept apart."""
    elsewhere = {"logits": f"{tiny_cache.paths.logits}_packed"}
    packed = change(tiny_cache, prepare={"attention": "packed"}, paths=elsewhere)
    capture_all(packed)
    assert gate(change(packed, prepare={"attention": "documents"})).passed
    reader = open_cache(packed)
    said = reader.top_k(np.arange(len(reader.corpus)))
    writer = make_capture(tiny_cache, "train").writer
    for shard in range(writer.layout.num_shards):
        start, stop = writer.layout.rows_of(shard)
        writer.write(shard, said[start:stop], hash_rows(reader.corpus.rows(start, stop)))
    assert not gate(tiny_cache).passed


@pytest.mark.parametrize(("k", "draws"), [(8, 8), (1, 20), (0, 50)])
def test_caches_with_draws_pass_and_fail_as_others_do(
    k: int, draws: int, tiny_corpus: Params
) -> None:
    params = change(tiny_corpus, prepare={"k": k, "draws": draws})
    capture_all(params)
    report = gate(params)
    assert report.passed, report.failures
    rewrite(params, shifted_by_one)
    assert not gate(params).passed


def test_agreement_worked_by_hand() -> None:
    live = top_k_from_logits(torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log(), 2, ())
    said = top_k_from_logits(torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log(), 2, ())
    at_said = torch.tensor([[0.5, 0.1]]).log()  # live probabilities at ids 0 and 2
    result = agreement(said, live, at_said)
    # (0.5, 0, 0.3) . (0.5, 0.3, 0) / |.|^2 = 0.25 / 0.34
    torch.testing.assert_close(result.cosine, torch.tensor([0.25 / 0.34]))
    torch.testing.assert_close(result.overlap, torch.tensor([0.5]))
    torch.testing.assert_close(result.top1, torch.tensor([1.0]))
    # KL over {0}, {2}, {rest}: 0.1 log(0.1 / 0.3) + 0.4 log(0.4 / 0.2)
    expected = 0.1 * np.log(1 / 3) + 0.4 * np.log(2)
    torch.testing.assert_close(result.kl, torch.tensor([expected], dtype=torch.float32))


def test_keeping_the_whole_vocabulary_passes(tiny_corpus: Params) -> None:
    """K + M beyond the vocabulary: the live side keeps all there is."""
    params = change(tiny_corpus, prepare={"k": 290, "draws": 20})
    capture_all(params)
    report = gate(params)
    assert report.passed, report.failures


def test_sorted_values_alone_would_prove_nothing() -> None:
    """Why the gate scatters by id: the sorted tails of unrelated positions look alike."""
    logits = torch.randn(400, 5000) * 2
    values = logits.topk(64).values
    sorted_cosine = torch.nn.functional.cosine_similarity(values[1:], values[:-1]).mean()
    assert float(sorted_cosine) > 0.99
    topk = top_k_from_logits(logits.clone(), 64, ())
    moved = topk[torch.arange(399)]
    at_moved = logits[1:].log_softmax(-1).gather(-1, moved.ids)
    assert float(agreement(moved, topk[1:], at_moved).cosine.mean()) < 0.2


def test_kl_of_the_gate_is_the_tail_bucket_kl() -> None:
    teacher, other = torch.randn(5, 90) * 2, torch.randn(5, 90) * 2
    said, live = top_k_from_logits(other.clone(), 9, ()), top_k_from_logits(teacher.clone(), 9, ())
    at_said = teacher.log_softmax(-1).gather(-1, said.ids)
    result = agreement(said, live, at_said)
    # KL(live || said) with said's ids as T: swap the roles in the reference
    target = top_k_from_logits(teacher.clone(), 90, ())
    log_p = target.logprobs.new_empty(5, 90).scatter(-1, target.ids, target.logprobs)
    kept = log_p.gather(-1, said.ids)
    swapped = top_k_from_logits(teacher.clone(), 9, ())
    swapped = swapped.__class__(**{**vars(swapped), "ids": said.ids, "logprobs": kept})
    torch.testing.assert_close(result.kl, tail_bucket_kl(other, swapped, 1.0), atol=1e-5, rtol=1e-4)
