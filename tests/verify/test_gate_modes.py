"""The gate on each kind of cache: cut at a mass, counts alone, targets at some positions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pipeline.config.params import Params
from pipeline.data.corpus import build_corpus
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import positions_in_loss
from pipeline.errors import DecantError
from pipeline.targets.selection import cut_to_mass, keep_highest_entropy
from pipeline.targets.topk import TopK
from pipeline.verify.positions import entropy_gap, misplaced
from stages.verify import main
from tests.helpers import (
    capture_all,
    change,
    gate,
    gate_and_histogram,
    live_teacher,
    open_cache,
    rewrite_cache,
)
from tests.models import make_teacher, make_tokenizer

FEW = {"batches": 10, "noise_batches": 3}
MODES: dict[str, dict[str, Any]] = {
    "cut": {"k": 8, "top_p": 0.9},
    "counts": {"k": 0, "num_sampled": 50, "temperatures": [1.0]},
    "kept and counts": {"k": 4, "num_sampled": 16, "temperatures": [1.0]},
    "kept and sampled": {"k": 4, "num_sampled": 16, "temperatures": [1.0, 2.0]},
    "high entropy": {"k": 8, "positions": "high_entropy"},
    "all at once": {
        "k": 8,
        "top_p": 0.8,
        "num_sampled": 8,
        "temperatures": [1.0, 2.0],
        "positions": "high_entropy",
        "entropy_quantile": 0.3,
    },
}
LEFT_OUT = {
    "cut": {"entropy_gap", "sampled_agreement"},
    "counts": {
        "mean_kl",
        "max_kl",
        "top1",
        "overlap",
        "logprob_error",
        "lse_tau_error",
        "entropy_gap",
    },
    "kept and counts": {"lse_tau_error", "entropy_gap"},
    "kept and sampled": {"entropy_gap"},
    "high entropy": {"sampled_agreement"},
    "all at once": set(),
}


@pytest.fixture(scope="session")
def sharp_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose distributions are far from flat, so that a cut at 0.9 leaves few ids."""
    folder = tmp_path_factory.mktemp("sharp") / "model"
    return make_teacher(folder, seed=1, initializer_range=0.5)


@pytest.fixture
def sharp(tiny_params: Params, sharp_teacher: Path) -> Params:
    """`tiny_params` with this teacher, and the corpus built."""
    params = change(tiny_params, paths={"teacher": str(sharp_teacher)}, verify=FEW)
    build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    return params


def shifted(topk: TopK) -> TopK:
    """Each target moved to the next position that has one, so that the positions are right."""
    has_target = topk.has_target
    moved = topk[has_target].map(lambda t: t.roll(1, 0))
    return moved.spread(has_target.flatten().nonzero()[:, 0], has_target.shape)


def repeated_counts_lost(topk: TopK) -> TopK:
    return replace(topk, sampled_counts=topk.sampled_counts.clamp_max(1))


def counts_moved(topk: TopK) -> TopK:
    """The numbers of the ids of a position, which add up to M, in another order."""
    counts, some = topk.sampled_counts, topk.sampled_counts > 0
    order = torch.where(some, -counts, 1).argsort(-1)  # the largest first, empty slots last
    moved = counts.gather(-1, order)
    first = some.long().argsort(dim=-1, descending=True, stable=True)
    return replace(topk, sampled_counts=torch.zeros_like(counts).scatter(-1, first, moved))


def off(name: str, amount: float) -> Callable[[TopK], TopK]:
    return lambda topk: replace(topk, **{name: getattr(topk, name) + amount})


def cut_at(top_p: float) -> Callable[[TopK], TopK]:
    def cut(topk: TopK) -> TopK:
        flat = (topk.ids.flatten(0, 1), topk.logprobs.flatten(0, 1))
        ids, logprobs = (t.view_as(topk.ids) for t in cut_to_mass(*flat, top_p))
        return replace(topk, ids=ids, logprobs=logprobs)

    return cut


def of_lowest_entropy(topk: TopK) -> TopK:
    """Other positions of those that are stored, as many as a quantile of 0.5 chooses."""
    upside_down = keep_highest_entropy(replace(topk, entropy=-topk.entropy), 0.5)
    return replace(upside_down, entropy=topk.entropy)


FAULTS: dict[str, dict[str, tuple[Callable[[TopK], TopK], str]]] = {
    "cut": {
        "shift": (shifted, "mean cosine"),
        "another cut": (cut_at(0.8), "mean overlap of ids"),
        "lse_tau": (off("lse_tau", 0.01), "error of lse_tau"),
    },
    "counts": {
        "shift": (shifted, "agreement of sampled ids"),
        "lost counts": (repeated_counts_lost, "counts do not add up to 50"),
        "moved counts": (counts_moved, "agreement of sampled ids"),
        "entropy": (off("entropy", 0.01), "error of entropy"),
        "lse": (off("lse", 0.1), "error of lse"),
    },
    "kept and counts": {"shift": (shifted, "mean cosine")},
    "kept and sampled": {
        "shift": (shifted, "mean cosine"),
        "moved counts": (counts_moved, "agreement of sampled ids"),
        "sampled log-probabilities": (off("sampled_logprobs", 0.1), "sampled ids"),
        "lse_tau": (off("lse_tau", 0.01), "error of lse_tau"),
    },
    "high entropy": {"shift": (shifted, "mean cosine")},
    "all at once": {
        "shift": (shifted, "mean cosine"),
        "another cut": (cut_at(0.7), "mean overlap of ids"),
    },
}


@pytest.mark.parametrize("mode", MODES)
def test_a_good_cache_passes_and_a_bad_one_fails(
    mode: str, sharp: Params, teacher_folder: Path
) -> None:
    params = change(sharp, prepare=MODES[mode])
    capture_all(params)
    report, histogram = gate_and_histogram(params)
    assert report.passed, report.failures
    assert {name for name, value in vars(report.cache).items() if value is None} == LEFT_OUT[mode]
    assert "nan" not in "".join(report.lines())
    assert sum(bar.share for bar in histogram) == pytest.approx(3.0)
    assert bool(report.sampling_tests) == bool(params.prepare.num_sampled)
    stored = {split: open_cache(params, split) for split in ("train", "validation")}
    if params.prepare.top_p:
        topk = stored["train"].top_k(np.arange(20))
        cut = topk.is_kept[topk.has_target].sum(-1)
        assert len(cut.unique()) > 4  # the teacher is sharp at some positions and flat at others
    other = change(params, paths={"teacher": str(teacher_folder)})
    assert not gate(params, live_teacher(other)).passed
    good = stored["train"].top_k(np.arange(len(stored["train"].corpus)))
    for name, (fault, sentence) in FAULTS[mode].items():
        rewrite_cache(params, lambda _, fault=fault: fault(good))
        failures = gate(params).failures
        assert any(sentence in failure for failure in failures), (name, failures)


def test_targets_at_wrong_positions_are_caught(sharp: Params) -> None:
    params = change(sharp, prepare=MODES["high entropy"])
    capture_all(params)
    everywhere = change(
        sharp, prepare={"k": 8}, paths={"logits": f"{params.paths.logits}_everywhere"}
    )
    capture_all(everywhere)
    reader = open_cache(everywhere)
    everything = reader.top_k(np.arange(len(reader.corpus)))
    report = gate(params)
    assert report.passed
    assert report.limits.errors["entropy_gap"].mean == 0.001
    assert report.cache.entropy_gap == 0.0

    def one_exchanged(topk: TopK) -> TopK:
        """In each row: the position with the lowest entropy for that with the highest."""
        rows = torch.arange(len(topk.lse))
        inside = everything.has_target
        low = everything.entropy.masked_fill(~inside, torch.inf).argmin(-1)
        high = everything.entropy.masked_fill(~inside, -torch.inf).argmax(-1)
        has_target = topk.has_target.clone()
        has_target[rows, low], has_target[rows, high] = True, False
        return replace(everything, has_target=has_target)

    rewrite_cache(params, one_exchanged)
    assert any("mean entropy gap of the chosen" in failure for failure in gate(params).failures)
    rewrite_cache(params, lambda _: of_lowest_entropy(everything))
    assert any("mean entropy gap of the chosen" in failure for failure in gate(params).failures)
    rewrite_cache(params, lambda _: everything)
    assert any("targets are missing, or at pos" in failure for failure in gate(params).failures)


def test_the_noise_of_half_formats_may_exchange_positions(sharp: Params) -> None:
    """And change where a cut at a mass lies."""
    params = change(sharp, prepare=MODES["all at once"] | {"dtype": "float16"})
    capture_all(params)
    for seed in range(3):
        report = gate(params, seed=seed)
        assert report.passed, report.failures


def test_the_stage_needs_no_parameters_of_the_cache(sharp: Params, tmp_path: Path) -> None:
    """It compares what the fingerprint says, whatever prepare.* says now."""
    capture_all(change(sharp, prepare=MODES["all at once"]))
    words = ["--params", str(tmp_path / "params.yaml"), "--set", "verify.batches=5"]
    teacher = f"paths.teacher={sharp.paths.teacher}"
    done = CliRunner().invoke(main, [*words, "--set", teacher])
    assert done.exit_code == 0, done.output
    assert "in the choice by entropy" in done.output
    assert "gate passed" in done.output


TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
)


@pytest.fixture
def chats(tiny_params: Params, tmp_path: Path) -> Params:
    """Conversations whose prompts are longer than a row, so that rows lack a target."""
    folder = make_teacher(tmp_path / "chat_teacher", initializer_range=0.5)
    tokenizer = make_tokenizer(folder, vocab_size=298)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    lines = []
    for i in range(30):
        user = {"role": "user", "content": f"Note {i}? " + "the river finds a tower. " * 14}
        assistant = {"role": "assistant", "content": "the cat sees a river. " * (1 + i % 4)}
        lines.append(json.dumps({"messages": [user, assistant]}))
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    params = change(
        tiny_params,
        paths={"teacher": str(folder)},
        corpus={
            "files": {"paths": [str(tmp_path / "chats.jsonl")], "column": "messages"},
            "loss_on": "completions",
            "train_tokens": 2000,
            "validation_tokens": 500,
        },
        verify=FEW,
    )
    build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    return params


@pytest.mark.parametrize("batch_rows", [1, 3])
def test_completions_alone(batch_rows: int, chats: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    params = change(
        chats,
        prepare={"k": 4, "num_sampled": 16, "chunk_rows": 2, "shard_rows": 4},
        verify={"batch_rows": batch_rows},
    )
    capture_all(params)
    corpus = CorpusSplit(params.paths.corpus, "train")
    wanted = positions_in_loss(corpus.rows(0, len(corpus)))
    assert 5 < int(wanted.any(-1).sum()) < len(corpus) - 5  # rows without any target
    asked = []
    teacher = live_teacher(params)
    by_chunk = teacher.logits_by_chunk

    def spy(tokens: torch.Tensor, doc_ids: Any = None, positions: Any = None) -> Any:
        asked.append((tokens.numel(), len(positions)))
        return by_chunk(tokens, doc_ids, positions)

    monkeypatch.setattr(teacher, "logits_by_chunk", spy)
    report = gate(params, teacher)
    assert report.passed, report.failures
    assert report.tokens > 100
    assert all(0 < positions < tokens for tokens, positions in asked)
    reader = open_cache(params)
    good = reader.top_k(np.arange(len(reader.corpus)))
    rewrite_cache(params, lambda _: shifted(good))
    assert any("mean cosine" in failure for failure in gate(params).failures)
    rewrite_cache(params, lambda _: good.map(lambda t: t.roll(1, 1)))
    assert any("targets are missing" in failure for failure in gate(params).failures)
    has_target = good.has_target.clone()
    has_target[1::2] = False
    rewrite_cache(params, lambda _: replace(good, has_target=has_target))
    assert any("targets are missing" in failure for failure in gate(params).failures)


def test_no_target_at_all_is_a_sentence(chats: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    capture_all(chats)
    for split in ("train", "validation"):
        rewrite_cache(
            chats,
            lambda topk: replace(topk, has_target=torch.zeros_like(topk.has_target)),
            split=split,
        )
    with pytest.raises(DecantError, match="holds no target in rows that have positions in the lo"):
        gate(chats)
    monkeypatch.setattr(
        "pipeline.verify.gate.positions_in_loss", lambda rows: torch.zeros(rows.tokens.shape).bool()
    )
    with pytest.raises(DecantError, match="none of 10 rows has a position in the loss"):
        gate(chats)


def test_positions_worked_by_hand() -> None:
    wanted = torch.tensor([[True, True, True, True, False], [True, False, False, False, False]])
    entropy = torch.tensor([[1.0, 4.0, 3.0, 2.0, 9.0], [1.0, 5.0, 5.0, 5.0, 5.0]])
    gap = entropy_gap(entropy, wanted, 0.5)  # two of four, and one of one
    assert gap[wanted].tolist() == [2.0, 0.0, 0.0, 1.0, 0.0]
    assert entropy_gap(entropy, wanted, 0.0)[wanted].tolist() == [0.0] * 5
    assert misplaced(wanted, wanted, 0.0).tolist() == [0, 0]
    assert misplaced(wanted, wanted, 0.5).tolist() == [2, 0]
    elsewhere = torch.tensor([[True, False, True, False, True], [False, True, False, False, False]])
    assert misplaced(elsewhere, wanted, 0.5).tolist() == [1, 2]
