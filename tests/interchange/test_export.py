"""The cache in the columns of other tools, read back by loaders written after theirs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.capture.local import capture_locally
from pipeline.config.params import Params
from pipeline.data.corpus_zarr import SPLITS, CorpusSplit
from pipeline.data.packing import IGNORE, row_labels
from pipeline.errors import DecantError, MismatchError, ParamsError
from pipeline.interchange.axolotl import axolotl_table, lost_to_axolotl
from pipeline.interchange.dataset_folder import write_dataset
from pipeline.interchange.hf_dataset import lost_to_datasets, plain_table
from pipeline.losses.reference import distillation_loss
from pipeline.targets.topk import TopK
from tests.helpers import capture_all, change, open_cache


def readers_of(params: Params) -> list[Any]:
    return [open_cache(params, split) for split in SPLITS]


def export(params: Params, output: Path, to_table: Any, k: int | None = None) -> Any:
    write_dataset(output, readers_of(params), to_table, k=k, text="For a test")
    return datasets.load_dataset(str(output), cache_dir=str(output.parent / "hub"))


def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What axolotl's DataCollatorForKD makes of a batch, for a tokenizer that pads on the right."""
    length = max(len(one["labels"]) for one in examples)
    most = max(len(slots) for one in examples for slots in one["target_logprobs"])
    filling = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    batch = {
        name: torch.tensor([one[name] + [value] * (length - len(one[name])) for one in examples])
        for name, value in filling.items()
    }
    slots = {"target_logprobs": -1e9, "target_token_ids": 0, "target_mask": 0}
    for name, value in slots.items():
        rows = [
            [of + [value] * (most - len(of)) for of in one[name]]
            + [[value] * most] * (length - len(one[name]))
            for one in examples
        ]
        batch[name] = torch.tensor(rows)
    return batch


def axolotl_loss(logits: Tensor, batch: dict[str, Tensor], temperature: float) -> Tensor:
    """The divergence of its trainer with kd_normalize_topk: true, kd_beta: 0, per token."""
    scaled = logits.double() / temperature
    at_ids = scaled.gather(-1, batch["target_token_ids"]).log_softmax(-1)
    valid = batch["target_mask"].bool()
    log_p, log_q = batch["target_logprobs"].double()[valid], at_ids[valid]
    count = (batch["labels"] != -100).sum()
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum() / count


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_axolotl_trains_on_what_the_cache_says(
    document_mask: bool, temperature: float, tiny_corpus: Params, tmp_path: Path
) -> None:
    """Its loss on its batch is the renormalised KL of ours, of the same logits at each token."""
    params = change(tiny_corpus, prepare={"document_mask": document_mask})
    capture_all(params)
    to_table = axolotl_table(document_mask=document_mask, temperature=temperature)
    found = export(params, tmp_path / "out", to_table)
    assert set(found) == set(SPLITS)
    corpus = CorpusSplit(params.paths.corpus, "train")
    rows = corpus.rows(0, len(corpus))
    labels = row_labels(rows)
    is_target = labels != IGNORE
    topk = open_cache(params).top_k(np.arange(len(corpus)))
    said = (topk.logprobs.clamp_min(-20.0) + 8.0) * topk.has_target[..., None]
    logits_of = torch.randn(*rows.tokens.shape, 300).scatter_add_(-1, topk.ids, said)
    examples, places = list(found["train"]), places_of(rows, document_mask=document_mask)
    assert len(examples) == len(places)
    logits = torch.zeros(len(examples), max(len(e["labels"]) for e in examples), 300)
    for number, (one, (row, place)) in enumerate(zip(examples, places, strict=True)):
        assert one["input_ids"] == rows.tokens[row, place].tolist()
        assert one["attention_mask"] == [1] * len(one["input_ids"])
        assert one["labels"][0] == -100
        assert one["labels"][1:] == labels[row, place].tolist()[:-1]
        logits[number, : place.stop - place.start] = logits_of[row, place]
    batch = collate(examples)
    assert int((batch["labels"] != -100).sum()) == int(is_target.sum())
    valid = batch["target_mask"].bool()
    assert torch.equal(valid.any(-1)[:, :-1], batch["labels"][:, 1:] != -100)
    mass = batch["target_logprobs"].double().exp().masked_fill(~valid, 0.0).sum(-1)[valid.any(-1)]
    torch.testing.assert_close(mass, torch.ones_like(mass), atol=1e-6, rtol=0)
    ours = distillation_loss(
        logits_of[is_target],
        labels[is_target],
        topk[is_target],
        alpha=1.0,
        temperature=temperature,
        divergence="renormalised_kl",
    ).mean()
    theirs = axolotl_loss(logits, batch, temperature)
    torch.testing.assert_close(theirs, ours.double(), rtol=1e-4, atol=0)
    # and a shift either way is noticed
    for shift in (1, -1):
        wrong = axolotl_loss(logits.roll(shift, 1), batch, temperature)
        assert float(wrong) > 2.0 * float(theirs)


def places_of(rows: Any, *, document_mask: bool) -> list[tuple[int, slice]]:
    """The examples, found token by token."""
    found = []
    for row, doc_ids in enumerate(rows.doc_ids.tolist()):
        cuts = [t for t in range(1, len(doc_ids)) if doc_ids[t] != doc_ids[t - 1]]
        if not document_mask:
            cuts = [t for t in cuts if -1 in doc_ids[t : t + 1]]
        for start, stop in pairwise([0, *cuts, len(doc_ids)]):
            if doc_ids[start] != -1 and stop - start > 1:
                found.append((row, slice(start, stop)))
    return found


@pytest.mark.parametrize(
    "prepare",
    [
        {},
        {"top_p": 0.3, "temperatures": [1.0]},
        {"k": 5, "num_sampled": 9, "positions": "high_entropy"},
        {"k": 0, "num_sampled": 12, "temperatures": [1.0]},
    ],
    ids=str,
)
def test_a_plain_dataset_says_what_the_cache_does(
    prepare: dict[str, Any], tiny_corpus: Params, tmp_path: Path
) -> None:
    params = change(tiny_corpus, prepare=prepare)
    capture_all(params)
    found = export(params, tmp_path / "out", plain_table)
    for reader in readers_of(params):
        corpus, made_from = reader.corpus, reader.fingerprint
        table = found[corpus.split].with_format("numpy")
        assert len(table) == len(corpus)
        rows, topk = corpus.rows(0, len(corpus)), reader.top_k(np.arange(len(corpus)))
        kept = ("teacher_ids", "teacher_logprobs") if made_from.k else ()
        drawn = ("sampled_ids", "sampled_counts") if made_from.num_sampled else ()
        tau = ("lse_tau",) if made_from.temperatures else ()
        names = ("input_ids", "labels", "doc_ids", *kept, "entropy", "lse", *tau, *drawn)
        assert set(table.column_names) == set(names)
        np.testing.assert_array_equal(np.stack(table["input_ids"]), rows.tokens)
        np.testing.assert_array_equal(np.stack(table["doc_ids"]), rows.doc_ids)
        labels = np.stack(table["labels"])
        np.testing.assert_array_equal(labels[:, 1:], row_labels(rows).numpy()[:, :-1])
        np.testing.assert_array_equal(np.stack(table["lse"]), topk.lse.numpy())
        np.testing.assert_array_equal(np.stack(table["entropy"]), topk.entropy.numpy())
        for row, one in enumerate(found[corpus.split]):
            for t, has_target in enumerate(topk.has_target[row].tolist()):
                assert_position(one, topk, row, t, has_target=has_target)
            if row == 3:
                break


def assert_position(one: dict[str, Any], topk: TopK, row: int, t: int, *, has_target: bool) -> None:
    """The lists of one position, against the tensors."""
    if topk.k:
        number = int(topk.is_kept[row, t].sum()) if has_target else 0
        assert one["teacher_ids"][t] == topk.ids[row, t, :number].tolist()
        assert one["teacher_logprobs"][t] == topk.logprobs[row, t, :number].tolist()
    if topk.temperatures:
        assert one["lse_tau"][t] == topk.lse_tau[row, t].tolist()
    if topk.num_sampled:
        counts = topk.sampled_counts[row, t]
        drawn = (counts > 0) & has_target
        assert one["sampled_ids"][t] == topk.sampled_ids[row, t][drawn].tolist()
        assert one["sampled_counts"][t] == counts[drawn].tolist()


def test_what_is_lost_is_said(tiny_corpus: Params) -> None:
    params = change(tiny_corpus, prepare={"k": 5, "num_sampled": 9})
    capture_locally(params)
    made_from = open_cache(params).fingerprint
    lost = "; ".join(lost_to_axolotl(made_from))
    assert "the mass outside the kept ids" in lost
    assert "lse, entropy and normalisers" in lost
    assert "9 sampled ids per position" in lost
    assert "log-probabilities of the sampled ids" in "; ".join(lost_to_datasets(made_from))


def test_a_smaller_k(tiny_cache: Params, tmp_path: Path) -> None:
    to_table = axolotl_table(document_mask=True, temperature=1.0)
    found = export(tiny_cache, tmp_path / "out", to_table, k=3)
    assert {len(ids) for ids in found["train"][0]["target_token_ids"]} == {0, 3}
    assert "the top 3 of each position" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ParamsError, match="--k 17 exceeds the 16 ids"):
        write_dataset(tmp_path / "other", readers_of(tiny_cache), to_table, k=17, text="")
    assert not (tmp_path / "other").exists()


def test_a_smaller_k_does_not_go_with_sampled_ids(tiny_corpus: Params, tmp_path: Path) -> None:
    params = change(tiny_corpus, prepare={"k": 5, "num_sampled": 9})
    capture_all(params)
    with pytest.raises(ParamsError, match="--k 3 does not go with sampled ids"):
        write_dataset(tmp_path / "out", readers_of(params), plain_table, k=3, text="")


def test_a_half_written_folder_is_never_there(
    tiny_cache: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, calls = tmp_path / "out", iter(range(100))

    def dies(*args: Any) -> Any:
        if next(calls) == 1:
            raise DecantError("power cut")
        return plain_table(*args)

    with pytest.raises(DecantError, match="power cut"):
        export(tiny_cache, output, dies)
    assert not output.exists()
    export(tiny_cache, output, plain_table)
    before = sorted(file.name for file in output.iterdir())
    assert "train-00000-of-00006.parquet" in before
    export(tiny_cache, output, plain_table, k=2)  # replaces what is ours
    assert sorted(file.name for file in output.iterdir()) == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("")
    with pytest.raises(MismatchError, match="set --output to another place"):
        export(tiny_cache, mine, plain_table)
