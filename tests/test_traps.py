"""Mistakes that look right and train something else, each shown to be absent.

labels shifted the wrong way            tests/data/test_packing.py: a shift either way is noticed
RMSNorm that subtracts the mean         tests/model/test_decoder.py, tests/study/test_parts.py
KL summed over a row and divided by     here
the number of rows
rows of the head that no id points to   here
taken for ids
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.params import Params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import IGNORE, next_token_labels
from pipeline.report import read_curves
from pipeline.training.run import run_training
from tests.helpers import capture_all, change, open_cache
from tests.models import VOCABULARY_ROWS, make_teacher

TOKENIZER_IDS = 300


def test_kl_is_a_mean_over_tokens_not_over_rows(tiny_corpus: Params) -> None:
    """KL(p || uniform) = log V - H(p): what a student that knows nothing must show.

    PyTorch's `batchmean` on [rows, tokens, ids] would show 31 times as much.
    """
    corpus = CorpusSplit(tiny_corpus.paths.corpus, "train")
    shape = {"init": "random", "hidden_size": 32, "num_layers": 1, "num_heads": 2}
    shape |= {"num_kv_heads": 1, "intermediate_size": 16, "vocab_size": TOKENIZER_IDS}
    params = change(
        tiny_corpus,
        prepare={"k": TOKENIZER_IDS},  # nothing is merged: the full divergence
        student=shape,
        train={"steps": 1, "warmup_steps": 0, "batch_rows": len(corpus)},
    )
    capture_all(params)
    run_training(params, "uniform")
    curves = read_curves(params.paths.runs / "uniform" / "dvclive" / "plots" / "metrics")
    rows = corpus.rows(0, len(corpus))
    tensors = map(torch.from_numpy, (rows.tokens, rows.doc_ids, rows.in_loss))
    labels = next_token_labels(*tensors)
    in_loss = labels != IGNORE
    assert in_loss.sum() > 20 * len(corpus)
    entropy = open_cache(params).top_k(torch.arange(len(corpus)).numpy()).entropy.float()
    expected = math.log(TOKENIZER_IDS) - float(entropy[in_loss].mean())
    assert expected > 0.15
    assert curves["train/divergence"][1][0] == pytest.approx(expected, rel=0.1)


def test_rows_that_no_id_points_to_carry_no_mass(
    tiny_corpus: Params, text_folder: Path, tmp_path: Path
) -> None:
    """The teacher has 320 rows for 300 ids: whatever the 20 further ones hold, nothing changes."""
    assert VOCABULARY_ROWS > TOKENIZER_IDS
    capture_all(tiny_corpus)
    plain = open_cache(tiny_corpus).top_k(torch.arange(8).numpy())
    folder = make_teacher(tmp_path / "loud")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][TOKENIZER_IDS:] *= 100.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    paths = {"teacher": str(folder), "logits": str(tmp_path / "loud.zarr")}
    loud_params = change(tiny_corpus, paths=paths)
    capture_all(loud_params)
    loud = open_cache(loud_params).top_k(torch.arange(8).numpy())
    assert int(loud.ids.max()) < TOKENIZER_IDS
    for name in ("ids", "lse", "entropy", "lse_tau"):
        assert torch.equal(getattr(plain, name), getattr(loud, name)), name
