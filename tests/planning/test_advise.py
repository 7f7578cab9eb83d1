"""The advice against truth: full softmax in float64, a real cache, numbers worked by hand."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.capture.capture import fingerprint_of
from pipeline.config.cache_params import AdviseParams, PrepareParams
from pipeline.config.params import Params
from pipeline.data.corpus_writer import SplitWriter
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import IGNORE, next_token_labels
from pipeline.errors import DecantError, ParamsError
from pipeline.model.attention_mask import document_positions
from pipeline.planning.advise import (
    Advice,
    EpochCosts,
    Kept,
    advise,
    break_even_epochs,
    modes_to_compare,
    sample_blocks,
    usable_ks,
)
from pipeline.planning.advise_text import (
    cost_lines,
    mode_lines,
    plot,
    position_line,
    recommendation,
    table_lines,
)
from pipeline.planning.cache_size import Mode
from pipeline.runtime.console import readable_bytes, readable_seconds
from pipeline.runtime.device import DTYPES
from pipeline.runtime.optional import install_hint
from pipeline.targets.reduce import top_k_from_logits
from pipeline.targets.topk import nats_lost
from tests.helpers import RunPython, capture_all, change, live_teacher, open_cache

WHOLE = {"sample": 1.0, "ks": [1, 4, 16, 64, 300, 301]}


def advice_of(params: Params) -> Advice:
    corpus = CorpusSplit(params.paths.corpus, "train")
    fingerprint = fingerprint_of(params, corpus, DTYPES[params.prepare.dtype])
    return advise(live_teacher(params), corpus, fingerprint, params)


def mostly_prompts(params: Params, every: int = 4) -> Params:
    """The same corpus in another place, with only each `every`-th token in the loss."""
    corpus = CorpusSplit(params.paths.corpus, "train")
    rows = corpus.rows(0, len(corpus))
    place = params.paths.corpus.with_name("mostly_prompts.zarr")
    info = corpus.info
    writer = SplitWriter(place, "train", row_length=info.row_length, vocab_size=info.vocab_size)
    mask = (np.arange(rows.tokens.size).reshape(rows.tokens.shape) + 1) % every == 0
    writer.add(replace(rows, in_loss=rows.in_loss & mask))
    writer.commit(num_text_bytes=0, tokenizer_sha256=info.tokenizer_sha256)
    return change(params, paths={"corpus": str(place)})


@torch.no_grad()
def true_logits(params: Params) -> Tensor:
    """Float64 [n, V]: the teacher run in float64 on every position in the loss."""
    corpus = CorpusSplit(params.paths.corpus, "train")
    rows = corpus.rows(0, len(corpus))
    arrays = (rows.tokens, rows.doc_ids, rows.in_loss)
    wanted = next_token_labels(*map(torch.from_numpy, arrays)) != IGNORE
    model = live_teacher(params).model.double()
    positions = document_positions(torch.from_numpy(rows.doc_ids))
    tokens = torch.from_numpy(rows.tokens)
    logits: Tensor = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    return logits[wanted][:, : corpus.info.vocab_size]


def test_mass_and_nats_are_those_of_the_full_softmax(tiny_corpus: Params) -> None:
    params = change(tiny_corpus, advise=WHOLE)
    advice = advice_of(params)
    logits = true_logits(params)
    assert [kept.mode.k for kept in advice.kept] == [1, 4, 16, 64, 300]
    for kept in advice.kept:
        assert set(kept.retained_mass) == {1.0, 2.0, 4.0}
        for temperature, mass in kept.retained_mass.items():
            p = (logits / temperature).softmax(-1).sort(-1, descending=True).values
            assert mass == pytest.approx(float(p[:, : kept.mode.k].sum(-1).mean()), abs=1e-6)
        p = logits.softmax(-1).sort(-1, descending=True).values
        tail = p[:, kept.mode.k :]
        tail_mass = tail.sum(-1, keepdim=True)
        inside = (tail_mass[:, 0] * torch.special.entr(tail / tail_mass).sum(-1)).nan_to_num()
        assert kept.nats_lost == pytest.approx(float(inside.mean()), abs=5e-6)


def test_nats_lost_worked_by_hand() -> None:
    """Keeping 1/2 of (1/2, 1/4, 1/8, 1/8) leaves half the mass with (1/2, 1/4, 1/4) inside."""
    topk = top_k_from_logits(torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log(), 1, ())
    assert float(nats_lost(topk)) == pytest.approx(0.5 * 1.5 * math.log(2.0))


def test_size_is_that_of_a_real_cache(tiny_cache: Params) -> None:
    reader = open_cache(tiny_cache)
    positions = reader.fingerprint.num_rows * reader.fingerprint.row_length
    advice = advice_of(change(tiny_cache, advise=WHOLE))
    kept = next(kept for kept in advice.kept if kept.mode.k == tiny_cache.prepare.k)
    assert kept.bytes_a_token == pytest.approx(reader.num_bytes() / positions, rel=0.02)
    assert kept.corpus_bytes == pytest.approx(reader.num_bytes(), rel=0.02)


def test_a_sample_stands_for_the_whole(tiny_corpus: Params) -> None:
    whole = advice_of(change(tiny_corpus, advise={"sample": 1.0, "ks": [16]}))
    part = advice_of(change(tiny_corpus, advise={"sample": 0.3, "ks": [16]}))
    assert (whole.rows, part.rows, part.corpus_rows) == (94, 29, 94)
    for name in ("bytes_a_token", "nats_lost", "corpus_bytes"):
        values = getattr(part.kept[0], name), getattr(whole.kept[0], name)
        assert values[0] == pytest.approx(values[1], rel=0.1)
    assert part.costs.top_k > 0.0


def test_ks_beyond_the_vocabulary_are_left_out() -> None:
    assert usable_ks((301, 4, 300, 4), 300) == ([4, 300], (301,))
    with pytest.raises(ParamsError, match=r"advise\.ks=\[301, 400\] all exceed the 300 ids"):
        usable_ks((400, 301), 300)


@given(
    num_rows=st.integers(1, 400),
    sample=st.floats(0.0, 1.0),
    min_rows=st.integers(1, 50),
    shard_rows=st.integers(1, 60),
)
def test_sample_rows_are_spread_evenly(
    num_rows: int, sample: float, min_rows: int, shard_rows: int
) -> None:
    params = AdviseParams(
        sample=sample, min_rows=min_rows, ks=(1,), device="cpu", devices=1, mfu=1.0
    )
    blocks = sample_blocks(num_rows, params, shard_rows)
    rows = sorted(row for block in blocks for row in block)
    assert len(rows) == min(num_rows, max(min_rows, math.ceil(sample * num_rows)))
    assert all(1 <= len(block) <= shard_rows for block in blocks)
    for some in (rows, blocks[0]):  # each row stands for num_rows / len(some) rows
        stride = num_rows / len(some)
        assert all(abs(row - i * stride) <= stride + 1.0 for i, row in enumerate(some))
        assert len(set(some)) == len(some)


def test_break_even_worked_by_hand() -> None:
    # 10 + 3 x 1 < 3 x 5, but 10 + 2 x 1 > 2 x 5
    assert break_even_epochs(capture=10.0, online=5.0, read=1.0) == 3
    assert break_even_epochs(capture=10.0, online=6.0, read=1.0) == 2  # 12 against 12
    assert break_even_epochs(capture=0.5, online=5.0, read=1.0) == 1
    assert break_even_epochs(capture=10.0, online=1.0, read=1.0) is None


def made_up(**changes: object) -> Advice:
    """Retained mass 0.9 and 0.97 at temperature 1, 0.5 and 0.6 at 2; 3 epochs to break even."""
    kept = tuple(
        Kept(
            mode=Mode(k=k),
            positions=0.8,
            num_ids=k,
            retained_mass={1.0: one, 2.0: two},
            nats_lost=0.1,
            bytes_a_token=2.5 * k,
            bytes_at_one=2.0 * k,
            corpus_bytes=2.5e6 * k,
        )
        for k, one, two in ((16, 0.9, 0.5), (32, 0.97, 0.6))
    )
    sampled = replace(
        kept[0],
        mode=Mode(k=0, num_sampled=50),
        num_ids=13.8,
        retained_mass={1.0: 1.0, 2.0: 1.0},
        nats_lost=0.0,
    )
    advice = Advice(
        rows=16,
        positions=4096,
        corpus_rows=4000,
        corpus_positions=1_000_000,
        kept=kept,
        modes=(kept[1], sampled),
        left_out=(),
        costs=EpochCosts(forward=400.0, top_k=500.0, encode=500.0, decode=100.0),
        epochs_per_run=0.5,
        temperature=1.0,
        break_even_epochs=3,
    )
    return replace(advice, **changes)  # type: ignore[arg-type]


def test_sentences() -> None:
    assert recommendation(made_up()) == (
        "prepare.k=32 is the smallest of advise.ks that keeps 95% of the mass at temperature 1: "
        "80.0 bytes per token, 80 MB for the corpus"
    )
    assert "no K up to 32 keeps 95% of the mass at temperature 2 (the largest keeps 60.0%)" in (
        recommendation(made_up(temperature=2.0))
    )
    capture, online, runs = cost_lines(made_up())
    assert "16.7 min for 1,000,000 tokens (2,000 tokens/s with the reduction, 2,500 for" in capture
    assert "caching pays from epoch 3 on" in online
    assert runs == "runs of train.* that make that many epochs, at 0.5 epochs each: 6"
    assert "caching does not pay" in cost_lines(made_up(break_even_epochs=None))[1]
    heading, *lines = table_lines(made_up())
    assert heading.split()[-1] == "corpus"
    assert lines[1].split() == ["32", "0.9700", "0.6000", "0.1000", "80.0", "80", "MB"]
    assert capture.startswith("capture of top 32 (prepare.*), an estimate: ")


def test_sentences_about_modes_and_positions() -> None:
    heading, first, sampled, tau, note = mode_lines(made_up())
    shown = [" ".join(line.split()) for line in (heading, first, sampled)]
    assert shown == [
        "kept positions ids mass at 1 nats lost bytes/token at [1.0] corpus",
        "top 32 80.0% 32.0 0.9700 0.1000 80.0 64.0 80 MB",
        "50 sampled ids 80.0% 13.8 1.0000 0.0000* 40.0 32.0 40 MB",
    ]
    assert len(heading) == len(first) == len(sampled)
    assert tau == "at [1.0]: bytes per token with prepare.temperatures=[1.0]"
    assert note == (
        "* nothing is lost on average over the draws: sampled ids make the target unbiased, with "
        "noise at each position"
    )
    hot = mode_lines(made_up(temperature=2.0))
    assert "mass at 2" in hot[0]
    assert hot[1].split()[4] == "0.6000"
    assert hot[-1].endswith("at a temperature other than 1")
    assert position_line(made_up()) == (
        "80.0% of positions are in the loss; the others (prompts, padding, ends of documents and "
        "rows) take no head and no bytes: top 32 takes about 20 MB less for it"
    )


def test_units() -> None:
    assert [readable_bytes(n) for n in (12, 999.7, 33_900_000, 1.7e14)] == [
        "12 B",
        "1 kB",
        "33.9 MB",
        "170 TB",
    ]
    assert readable_bytes(1.7e16) == "17,000 TB"
    assert [readable_seconds(s) for s in (0.123, 42.4, 90.0, 5400.0, 129_600.0)] == [
        "0.12 s",
        "42 s",
        "1.5 min",
        "1.5 h",
        "1.5 days",
    ]


def test_the_recommendation_is_for_the_temperature_of_training(tiny_corpus: Params) -> None:
    stored = change(tiny_corpus, train={"temperature": 2.0})
    assert advice_of(stored).temperature == 2.0
    other = change(tiny_corpus, train={"temperature": 3.0}, prepare={"temperatures": [2.0]})
    advice = advice_of(other)
    assert advice.temperature == 1.0
    assert set(advice.kept[0].retained_mass) == {1.0, 2.0}


def test_costs_are_those_of_what_prepare_would_store(tiny_corpus: Params) -> None:
    """Sampled ids alone: nothing of the table applies to them, the rates do."""
    advice = advice_of(change(tiny_corpus, prepare={"k": 0, "num_sampled": 8}))
    assert advice.modes[0].mode == Mode(k=0, num_sampled=8)
    assert min(vars(advice.costs).values()) > 0.0


MODES: list[dict[str, object]] = [
    {"top_p": 0.95},
    {"k": 0, "num_sampled": 50},
    {"k": 32, "num_sampled": 16},
    {"positions": "high_entropy", "entropy_quantile": 0.6},
    {"k": 8, "num_sampled": 4, "top_p": 0.5, "positions": "high_entropy"},
]


@pytest.mark.parametrize("prepare", MODES)
def test_each_mode_is_what_prepare_would_store(
    prepare: dict[str, object], tiny_corpus: Params
) -> None:
    """Size, positions and ids of a real cache of it."""
    params = change(tiny_corpus, prepare=prepare)
    capture_all(params)
    reader = open_cache(params)
    topk = reader.top_k(np.arange(reader.fingerprint.num_rows))
    own = advice_of(change(params, advise=WHOLE | {"ks": [16]})).modes[0]
    assert own.mode == Mode.of(params.prepare)
    wanted = topk[topk.has_target]
    num_ids = (wanted.is_kept.sum(-1) + (wanted.sampled_counts > 0).sum(-1)).double().mean()
    assert own.positions == float(topk.has_target.double().mean())
    assert own.num_ids == pytest.approx(float(num_ids), rel=1e-3)  # float16 shifts no cut by more
    assert own.corpus_bytes == pytest.approx(reader.num_bytes(), rel=0.04)
    assert own.bytes_at_one < own.bytes_a_token


def test_what_the_modes_keep(tiny_corpus: Params) -> None:
    """By the teacher's full softmax in float64, at temperature 1."""
    params = change(tiny_corpus, advise={"sample": 1.0, "ks": [16]}, prepare={"k": 300})
    advice = advice_of(params)
    found = {kept.mode: kept for kept in advice.modes}
    p = true_logits(params).softmax(-1).sort(-1, descending=True).values
    fuller = found[Mode(k=300)]
    for top_p in (0.99, 0.95, 0.9):
        kept = found[Mode(k=300, top_p=top_p)]
        inside = p.cumsum(-1) - p < top_p
        assert kept.num_ids == pytest.approx(float(inside.sum(-1).double().mean()), rel=1e-3)
        mass = float((p * inside).sum(-1).mean())
        assert kept.retained_mass[1.0] == pytest.approx(mass, abs=1e-4)
        assert kept.nats_lost > fuller.nats_lost
        assert kept.bytes_a_token < fuller.bytes_a_token
        fuller = kept
    sampled = found[Mode(k=0, num_sampled=50)]
    assert (sampled.retained_mass[1.0], sampled.nats_lost) == (1.0, 0.0)
    assert found[Mode(k=0, num_sampled=25)].num_ids < sampled.num_ids < 50
    half = found[Mode(k=300, entropy_quantile=0.5)]
    assert half.positions == pytest.approx(advice.share_in_loss / 2, rel=0.05)
    assert half.bytes_a_token < 0.65 * found[Mode(k=300)].bytes_a_token


def test_modes_that_a_vocabulary_allows() -> None:
    here = PrepareParams(k=8, num_sampled=2, top_p=0.5, positions="high_entropy")
    modes = modes_to_compare(here, 20)
    assert modes[0] == Mode(k=8, num_sampled=2, top_p=0.5, entropy_quantile=0.5)
    assert len(set(modes)) == len(modes)
    assert max(mode.k for mode in modes) == 8
    assert not [mode for mode in modes_to_compare(PrepareParams(k=0, num_sampled=4), 20) if mode.k]


def test_a_chat_counts_its_answers_alone(tiny_corpus: Params) -> None:
    """A corpus of which a quarter is in the loss: means are over that, sizes over all tokens."""
    whole = advice_of(change(tiny_corpus, advise=WHOLE))
    part = advice_of(change(mostly_prompts(tiny_corpus), advise=WHOLE))
    assert part.share_in_loss == pytest.approx(whole.share_in_loss / 4, rel=0.1)
    ratio = part.modes[0].bytes_a_token / whole.modes[0].bytes_a_token
    assert 0.2 < ratio < 0.45  # the few values of a tiny chunk compress worse
    assert part.modes[0].num_ids == whole.modes[0].num_ids == 16
    assert part.metrics()["share_in_loss"] == part.share_in_loss


def test_a_sample_without_a_target_is_one_sentence(tiny_corpus: Params) -> None:
    params = mostly_prompts(tiny_corpus, every=10**9)
    with pytest.raises(
        ParamsError, match=r"no position of the 16 rows in the sample is in the loss"
    ):
        advice_of(params)


def test_a_plot_without_matplotlib_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DecantError, match=re.escape(install_hint("report"))):
        plot(made_up())


def test_stage(tiny_corpus: Params, tmp_path: Path, run_python: RunPython) -> None:
    words = ["--params", str(tmp_path / "params.yaml"), "--set", "advise.ks=[4,16,64,512]"]
    done = run_python("stages/advise.py", *words)
    assert done.returncode == 0, done.stderr
    assert "left out, beyond the 300 ids: K=512" in done.stdout
    assert "caching " in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith("advise: 16 of 94 rows examined, ")
    metrics = json.loads((tiny_corpus.paths.advise / "metrics.json").read_text())
    assert [kept["k"] for kept in metrics["kept"]] == [4, 16, 64]
    assert [mode["name"] for mode in metrics["modes"]][:2] == ["top 16", "top 16, top_p=0.9"]
    assert "% of positions are in the loss; " in done.stdout
    assert "top 16, high_entropy 0.5 " in done.stdout
    assert metrics["left_out"] == [512]
    assert metrics["sample"] == {"rows": 16, "positions": 512}
    assert metrics["kept"][1]["corpus_bytes"] == pytest.approx(
        metrics["kept"][1]["bytes_a_token"] * 94 * 32
    )
    picture = (tiny_corpus.paths.advise / "advice.svg").read_text()
    assert picture.startswith("<svg")
    for words in ("retained mass", "temperature 4", "bytes per token", "50 sampled ids"):
        assert words in picture


def test_stage_without_matplotlib_prints_the_table(
    tiny_corpus: Params, tmp_path: Path, run_python: RunPython
) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    words = ["--params", str(tmp_path / "params.yaml")]
    done = run_python("stages/advise.py", *words, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "the plot is left out: a picture needs the package matplotlib" in done.stdout
    assert "bytes/token" in done.stdout
    assert (tiny_corpus.paths.advise / "metrics.json").exists()
    assert not (tiny_corpus.paths.advise / "advice.svg").exists()
