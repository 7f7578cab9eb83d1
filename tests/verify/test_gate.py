"""The gate must pass a good cache and fail every bad one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.params import Params
from pipeline.data.corpus_zarr import hash_rows
from pipeline.data.packing import positions_in_loss
from pipeline.logit_cache.codec import as_stored
from pipeline.losses.reference import tail_bucket_kl
from pipeline.model.attention_mask import documents_apart
from pipeline.targets.reduce import row_uniforms, top_k_from_logits
from pipeline.targets.selection import count_distinct
from pipeline.targets.topk import TopK
from pipeline.teacher.transformers import HuggingFaceTeacher
from pipeline.verify.agreement import agreement, comparable
from tests.helpers import (
    capture_all,
    change,
    gate,
    gate_and_histogram,
    live_teacher,
    make_capture,
    open_cache,
    rewrite_cache,
)
from tests.models import make_teacher
from tests.verify.faults import SAMPLING_FAULTS


def shifted_by_one(topk: TopK) -> TopK:
    return topk.map(lambda tensor: tensor.roll(1, dims=1))


@pytest.fixture
def half_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teachers whose passes differ as those of half formats do, or more: top-1 flips at 2 %."""
    exact = HuggingFaceTeacher.hidden_states

    def noisy(self: HuggingFaceTeacher, *args: Any) -> torch.Tensor:
        hidden = exact(self, *args)
        return hidden * (1.0 + 0.01 * torch.randn_like(hidden))

    monkeypatch.setattr(HuggingFaceTeacher, "hidden_states", noisy)


NOISY_TEACHER = {"min_mean_cosine": 0.99, "min_row_cosine": 0.98, "min_top1": 0.9}
"""Ceilings for the tiny teacher, whose distributions are almost flat."""


def test_a_good_cache_passes(tiny_cache: Params) -> None:
    report, histogram = gate_and_histogram(tiny_cache)
    assert report.passed, report.failures
    assert report.cache.mean_cosine > 0.9999
    assert report.cache.mean_kl < 1e-5
    assert report.cache.lse_error < 0.001  # a quarter step of float16 between 4 and 8
    assert report.cache.lse_tau_error < 1.3e-4  # half a step of entropies
    assert report.cache.entropy_error < 1.3e-4
    assert report.cache.entropy_gap is report.cache.sampled_agreement is None
    assert report.batches == report.rows == 20
    assert report.noise_floor.mean_cosine > 0.9999
    assert report.negative_control.mean_cosine < 0.9
    shares = [bar.share for bar in histogram if bar.series == "cache"]
    assert sum(shares) == pytest.approx(1.0)


def test_limits_follow_the_noise_floor_and_are_said(tiny_cache: Params) -> None:
    report = gate(tiny_cache)
    limits, found = report.limits.errors, report.found
    assert limits["entropy"].mean == 1e-3  # the resolution, since rounding is less
    assert limits["logprobs"].mean == pytest.approx(3 * report.noise_floor.logprob_error)
    assert limits["lse"].mean == pytest.approx(3 * report.noise_floor.lse_error)
    for name, levels in limits.items():
        assert found.errors[name].mean >= levels.mean, name
    assert (found.shards, found.shards_seen, found.wrong_shards) == (8, 8, 1)
    # 640 positions, less those at the end of rows and documents
    assert 550 < report.tokens < 620
    assert found.wrong_positions == pytest.approx(3.0 / report.tokens, rel=1e-2)
    said = report.lines()[-1]
    assert "one position in 1,000" in said
    assert str(found.batches_for["one position in 1,000"]) in said
    strict = gate(change(tiny_cache, verify={"max_lse_error": 1e-9}))
    assert strict.limits.errors["lse"].mean == 1e-9  # the ceiling
    (failure,) = strict.failures
    assert failure.startswith("mean error of lse 0.00")


def test_the_noise_floor_is_rounded_as_the_cache_is(tiny_cache: Params) -> None:
    reader, teacher = open_cache(tiny_cache), live_teacher(tiny_cache)
    rows = reader.corpus.rows(0, 4)
    apart = documents_apart(torch.from_numpy(rows.doc_ids), True)
    said = teacher.top_k(
        torch.from_numpy(rows.tokens),
        16,
        tiny_cache.prepare.temperatures,
        None,
        apart,
        wanted=positions_in_loss(rows),
    )
    stored, again = reader.top_k(np.arange(4)), as_stored(said)
    assert torch.equal(stored.has_target, again.has_target)
    stored, again = stored[stored.has_target], again[again.has_target]
    for name in ("ids", "logprobs", "lse", "lse_tau", "entropy"):
        assert torch.equal(getattr(stored, name), getattr(again, name)), name


def test_shift_by_one_is_caught(tiny_cache: Params) -> None:
    rewrite_cache(tiny_cache, shifted_by_one)
    report = gate(tiny_cache)
    assert not report.passed
    assert any("mean cosine" in failure for failure in report.failures)


def test_a_stale_shard_is_caught_whatever_the_seed(tiny_cache: Params) -> None:
    """With as many rows as there are shards each is looked at, a last one of a few rows too."""
    last = len(open_cache(tiny_cache).corpus) // 16 * 16
    rewrite_cache(tiny_cache, lambda topk: TopK.cat((topk[:last], topk[: len(topk.lse) - last])))
    for seed in range(5):
        assert not gate(change(tiny_cache, verify={"batches": 8}), seed=seed).passed


@pytest.mark.parametrize(
    ("field", "amount", "failure"),
    [
        ("lse", 0.49, "mean error of lse 0.3"),
        ("lse", 0.01, "mean error of lse 0.0"),
        ("lse_tau", 0.09, "mean error of lse_tau 0.0"),
        ("entropy", 0.09, "mean error of entropy 0.0"),
    ],
)
def test_a_wrong_sum_over_the_row_is_caught(
    field: str, amount: float, failure: str, tiny_cache: Params
) -> None:
    """In the training split, 4 rows of 5. Probabilities at temperature 1 are right."""

    def wrong(topk: TopK) -> TopK:
        tensor = getattr(topk, field).clone()
        if field == "lse_tau":
            tensor[..., 1] += amount  # one temperature of three
        else:
            tensor += amount
        return replace(topk, **{field: tensor})

    rewrite_cache(tiny_cache, wrong)
    first, offset = gate(tiny_cache).failures
    assert failure in first
    assert offset.startswith(f"mean offset of {field}")


def last_ids_permuted(topk: TopK) -> TopK:
    ids = topk.ids.clone()
    ids[..., 32:] = ids[..., 32:][..., torch.randperm(32)]
    return replace(topk, ids=ids)


def last_ids_off(topk: TopK) -> TopK:
    logprobs = topk.logprobs.clone()
    logprobs[..., 16:] += 0.1
    return replace(topk, logprobs=logprobs)


RANK_FAULTS = [
    (last_ids_permuted, "error of log-probabilities"),
    (last_ids_off, "mean offset of log-probabilities of k ="),
]


@pytest.mark.parametrize(("fault", "failure"), RANK_FAULTS)
def test_wrong_last_ids_are_caught(
    fault: Callable[[TopK], TopK], failure: str, tiny_corpus: Params
) -> None:
    params = change(tiny_corpus, prepare={"k": 64})
    capture_all(params)
    rewrite_cache(params, fault)
    assert any(failure in sentence for sentence in gate(params).failures)


@pytest.mark.usefixtures("half_noise")
@pytest.mark.parametrize(("fault", "failure"), RANK_FAULTS)
def test_wrong_last_ids_are_caught_under_noise(
    fault: Callable[[TopK], TopK], failure: str, tiny_corpus: Params
) -> None:
    params = change(tiny_corpus, prepare={"k": 64}, verify=NOISY_TEACHER)
    capture_all(params)
    report = gate(params)
    assert report.passed, report.failures
    assert report.noise_floor.logprob_error > 0.01  # ten times float32's, which is rounding
    rewrite_cache(params, fault)
    assert any(failure in sentence for sentence in gate(params).failures)


def test_one_position_in_a_thousand_is_caught(tiny_cache: Params) -> None:
    """By so little that neither the mean nor the worst row shows it."""
    everywhere = change(tiny_cache, verify={"batches": 200})
    report = gate(everywhere)
    assert report.passed, report.failures
    assert report.found.wrong_positions < 1e-3

    def wrong(topk: TopK) -> TopK:
        lse = topk.lse.clone()
        lse.view(-1)[topk.has_target.view(-1).nonzero()[500::1000]] += 0.05
        return replace(topk, lse=lse)

    rewrite_cache(tiny_cache, wrong)
    (failure,) = gate(everywhere).failures
    limit = report.limits.errors["lse"].position
    assert failure == (
        f"error of lse is above {limit:.3g} at 3 of {report.tokens:,} positions, more than 0"
    )


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


def test_a_blind_gate_is_a_failure(tiny_corpus: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a teacher that says the same everywhere, a cache shifted by one is right, too."""

    def same(self: HuggingFaceTeacher, tokens: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.linspace(-1.0, 1.0, 64).expand(*tokens.shape, 64)

    monkeypatch.setattr(HuggingFaceTeacher, "hidden_states", same)
    capture_all(tiny_corpus)
    assert gate(tiny_corpus).failures == [
        "the negative control, targets shifted by one, passed, so the gate could not detect a shift"
    ]


def test_bfloat16_cache_passes_with_its_own_noise(tiny_corpus: Params) -> None:
    params = change(tiny_corpus, prepare={"dtype": "bfloat16"})
    capture_all(params)
    assert gate(params).passed


def test_the_gate_attends_as_the_cache_did(tiny_cache: Params) -> None:
    """And catches a cache of packed rows that claims to be one of documents kept apart."""
    elsewhere = {"logits": f"{tiny_cache.paths.logits}_packed"}
    packed = change(tiny_cache, prepare={"document_mask": False}, paths=elsewhere)
    capture_all(packed)
    assert gate(change(packed, prepare={"document_mask": True})).passed
    reader = open_cache(packed)
    said = reader.top_k(np.arange(len(reader.corpus)))
    writer = make_capture(tiny_cache, "train").writer
    for shard in range(writer.layout.num_shards):
        start, stop = writer.layout.rows_of(shard)
        writer.write(shard, said[start:stop], hash_rows(reader.corpus.rows(start, stop)))
    assert not gate(tiny_cache).passed


DRAWN = [(0, 50), (32, 16)]


@pytest.mark.parametrize(("k", "num_sampled"), [*DRAWN, (1, 20)])
@pytest.mark.parametrize("seed", [0, 1])
def test_caches_with_draws_pass_and_fail_as_others_do(
    k: int, num_sampled: int, seed: int, tiny_corpus: Params
) -> None:
    params = change(tiny_corpus, prepare={"k": k, "num_sampled": num_sampled})
    params = params.model_copy(update={"seed": seed})
    capture_all(params)
    report = gate(params, seed=seed)
    assert report.passed, report.failures
    assert report.cache.sampled_agreement == 1.0
    assert list(report.sampling_tests) == [
        "inverse temperature",
        "equal pairs",
        "spread over rows",
        "spread over places",
    ]
    rewrite_cache(params, shifted_by_one)
    assert not gate(params).passed


def rewrite_draws(params: Params, fault: str) -> None:
    """Other ids in place of the sampled ids, with their true log-probabilities."""

    def change_draws(topk: TopK) -> TopK:
        reader = open_cache(params)
        rows = reader.corpus.rows(0, len(reader.corpus))
        doc_ids = torch.from_numpy(rows.doc_ids)
        chunks = live_teacher(params).logits_by_chunk(
            torch.from_numpy(rows.tokens), documents_apart(doc_ids, params.prepare.document_mask)
        )
        log_p = torch.cat([logits.clone() for _, logits in chunks]).log_softmax(-1)
        weights = log_p.exp().scatter(-1, topk.ids.flatten(0, 1), 0.0)
        uniforms = row_uniforms(
            range(len(topk.lse)), topk.lse.shape[1], topk.num_sampled, params.seed
        )
        ids, counts = count_distinct(SAMPLING_FAULTS[fault](weights, uniforms))
        log_p = log_p.gather(-1, ids if topk.temperatures else ids[:, :0])
        named = {"sampled_ids": ids, "sampled_counts": counts, "sampled_logprobs": log_p}
        shape = topk.lse.shape
        return replace(topk, **{name: t.view(*shape, t.shape[-1]) for name, t in named.items()})

    rewrite_cache(params, change_draws)


@pytest.mark.parametrize(("k", "num_sampled"), DRAWN)
@pytest.mark.parametrize("fault", SAMPLING_FAULTS)
def test_ids_that_are_no_draws_are_caught(
    fault: str, k: int, num_sampled: int, tiny_corpus: Params
) -> None:
    params = change(tiny_corpus, prepare={"k": k, "num_sampled": num_sampled})
    capture_all(params)
    rewrite_draws(params, fault)
    failures = gate(params).failures
    assert "mean agreement of sampled ids" in failures[0]
    among_kept = "sampled ids are among the kept ids"
    assert any(f.startswith("sampled ids: ") or among_kept in f for f in failures)


@pytest.mark.usefixtures("half_noise")
@pytest.mark.parametrize("fault", ["uniform", "temperature 0.5", "temperature 2"])
def test_ids_that_are_no_draws_are_caught_under_noise(fault: str, tiny_corpus: Params) -> None:
    params = change(tiny_corpus, prepare={"k": 0, "num_sampled": 50}, verify=NOISY_TEACHER)
    capture_all(params)
    report = gate(params)
    assert report.passed, report.failures
    assert 0.5 < report.noise_floor.sampled_agreement < 0.99
    rewrite_draws(params, fault)
    assert not gate(params).passed


def test_draws_of_another_seed_are_caught(tiny_corpus: Params) -> None:
    """A good sample, but not the one that the fingerprint promises."""
    params = change(tiny_corpus, prepare={"k": 0, "num_sampled": 50})
    capture_all(params)
    other = change(params, paths={"logits": f"{params.paths.logits}_other"})
    other = other.model_copy(update={"seed": 1})
    capture_all(other)
    said = open_cache(other).top_k(np.arange(len(open_cache(other).corpus)))
    rewrite_cache(params, lambda _: said)
    report = gate(params)
    assert all(test.passed for test in report.sampling_tests.values())
    assert any("mean agreement of sampled ids" in failure for failure in report.failures)


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


def test_a_repeated_sampled_id_counts_once() -> None:
    """Stored p = (1/2, 1/4, 1/4) with id 0 sampled twice and id 1; live q = (1/4, 1/2, 1/4)."""
    said = top_k_from_logits(
        torch.tensor([[0.5, 0.25, 0.25]]).log(), 0, (2.0,), torch.tensor([[0.1, 0.4, 0.6]])
    )
    assert said.sampled_ids[:, :2].tolist() == [[0, 1]]
    assert said.sampled_counts.tolist() == [[2, 1, 0]]
    q = torch.tensor([[0.25, 0.5, 0.25]]).log()
    live = top_k_from_logits(q, 3, (2.0,), torch.tensor([[0.1, 0.4, 0.6]]))
    result = agreement(said, live, q.gather(-1, said.sampled_ids))
    # KL over {0}, {1}, {rest}: 1/4 log(1/2) + 1/2 log 2; cosine of (1/2, 1/4) and (1/4, 1/2)
    torch.testing.assert_close(result.kl, torch.tensor([0.25 * math.log(2.0)]))
    torch.testing.assert_close(result.cosine, torch.tensor([0.8]))


def test_counts_alone_worked_by_hand() -> None:
    """Without log-probabilities of sampled ids, ids 0, 0, 1 are compared with 0, 1, 1."""
    uniforms = torch.tensor([[0.1, 0.4, 0.6]])
    said = top_k_from_logits(torch.tensor([[0.5, 0.25, 0.25]]).log(), 0, (), uniforms)
    live = top_k_from_logits(torch.tensor([[0.25, 0.5, 0.25]]).log(), 1, (), uniforms)
    result = agreement(said, live, torch.empty(1, 0))
    torch.testing.assert_close(result.sampled, torch.tensor([2 / 3]))
    torch.testing.assert_close(result.cosine, torch.tensor([0.8]))  # (2, 1) and (1, 2)
    assert comparable(said, entropy_quantile=0.0) == ["cosine", "lse", "entropy", "sampled"]
    for name in ("kl", "top1", "overlap", "logprobs", "lse_tau", "entropy_gap"):
        assert bool(getattr(result, name).isnan()), name


def test_a_cut_worked_by_hand() -> None:
    """The cut at 0.7 keeps ids 0 and 1 of the stored p, and id 0 alone of the live q."""
    p, q = torch.tensor([[0.6, 0.2, 0.1, 0.1]]), torch.tensor([[0.7, 0.1, 0.1, 0.1]])
    said, live = (top_k_from_logits(each.log(), 4, (2.0,), None, 0.7) for each in (p, q))
    assert (said.is_kept.sum(), live.is_kept.sum()) == (2, 1)
    result = agreement(said, live, q.log().gather(-1, said.ids))
    torch.testing.assert_close(result.overlap, torch.tensor([0.5]))
    # (0.6, 0.2) . (0.7, 0)
    torch.testing.assert_close(result.cosine, torch.tensor([0.6 / 0.4**0.5]))
    # over {0}, {1}, {rest}
    expected = 0.7 * np.log(0.7 / 0.6) + 0.1 * np.log(0.1 / 0.2) + 0.2 * np.log(0.2 / 0.2)
    torch.testing.assert_close(result.kl, torch.tensor([expected], dtype=torch.float32))
    torch.testing.assert_close(result.logprobs, torch.tensor([np.log(2.0)], dtype=torch.float32))
    bands = torch.tensor([[np.log(6 / 7), np.log(2.0), 0.0]], dtype=torch.float32)
    torch.testing.assert_close(result.signed[:, :3], bands)  # nothing is in k = 3 to 4


def test_rounding_may_leave_no_tail() -> None:
    """float16 rounds probabilities up to a sum of more than 1, though the tail has 2e-4."""
    p = torch.tensor([0.3528, 0.2750, 0.2543, 0.0641]).repeat(4000, 1) * (1 + torch.rand(4000, 4))
    p = torch.cat((p / p.sum(-1, keepdim=True) * (1 - 2e-4), torch.full((4000, 1), 2e-4)), -1)
    live = top_k_from_logits(p.log(), 4, ())
    said = as_stored(live)
    assert int((said.logprobs.exp().sum(-1) >= 1).sum()) > 200
    kl = agreement(said, live, p.log().gather(-1, said.ids)).kl
    assert float(kl.min()) > -1e-6
    assert float(kl.max()) < 1e-3
    # A tail that is missing from the cache is found all the same.
    whole = as_stored(top_k_from_logits(p[:, :4].log(), 4, ()))
    p = torch.cat((p[:, :4] * 0.9, torch.full((4000, 1), 0.1)), -1)
    live = top_k_from_logits(p.log(), 4, ())
    kl = agreement(replace(whole, vocab_size=5), live, p.log().gather(-1, whole.ids)).kl
    assert float(kl.min()) > 0.3


def test_keeping_the_whole_vocabulary_passes(tiny_corpus: Params) -> None:
    """K + M beyond the vocabulary: the live side keeps all there is."""
    params = change(tiny_corpus, prepare={"k": 290, "num_sampled": 20})
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
