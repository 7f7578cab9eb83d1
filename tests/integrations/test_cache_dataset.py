"""Corpus and cache as datasets of PyTorch: the rows and targets of training, for any process."""

from __future__ import annotations

import multiprocessing
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from pipeline.config.params import Params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import IGNORE, row_labels
from pipeline.data.row_order import ShuffledRows
from pipeline.errors import MismatchError, ParamsError
from pipeline.integrations.cache_dataset import (
    CacheDataset,
    IterableCacheDataset,
    Row,
    ShardSampler,
    collate,
    model_inputs,
    topk_of,
)
from tests.helpers import capture_all, change, open_cache

MODES: dict[str, dict[str, Any]] = {
    "top": {},
    "sampled": {"k": 4, "num_sampled": 6},
    "draws": {"k": 0, "num_sampled": 9, "temperatures": [1.0]},
    "nucleus": {"top_p": 0.8, "positions": "high_entropy", "entropy_quantile": 0.5},
}


def dataset_of(params: Params, split: str = "train", **options: Any) -> CacheDataset:
    return CacheDataset(str(params.paths.corpus), str(params.paths.logits), split, **options)


@pytest.fixture(params=MODES)
def cached(request: pytest.FixtureRequest, tiny_corpus: Params) -> Params:
    """A cache of each mode."""
    params = change(tiny_corpus, prepare=MODES[request.param])
    capture_all(params)
    return params


def test_rows_and_targets_are_those_of_the_cache(cached: Params) -> None:
    dataset = dataset_of(cached)
    corpus, reader = CorpusSplit(cached.paths.corpus, "train"), open_cache(cached)
    numbers = [len(corpus) - 1, 0, 17, 3, 40]
    batch = collate(dataset.__getitems__(numbers))
    wanted = reader.top_k(np.array(numbers))
    found = topk_of(batch, wanted.vocab_size)
    for name in ("has_target", "ids", "logprobs", "lse", "lse_tau", "entropy", "sampled_ids"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    if wanted.num_sampled:
        shares = wanted.sampled_counts / wanted.num_sampled
        assert torch.allclose(found.sampled_counts, shares, atol=1e-7)
        assert torch.equal(found.sampled_logprobs, wanted.sampled_logprobs)
    assert found.temperatures == wanted.temperatures
    for place, number in enumerate(numbers):
        rows = corpus.rows(number, number + 1)
        assert batch["input_ids"][place].tolist() == rows.tokens[0].tolist()
        assert batch["doc_ids"][place].tolist() == rows.doc_ids[0].tolist()
        labels = batch["labels"][place]
        assert torch.equal(labels[1:], row_labels(rows)[0, :-1])
        assert labels[0] == IGNORE
        kept = labels != IGNORE  # a label of transformers is the token itself
        assert torch.equal(labels[kept], batch["input_ids"][place][kept])
    assert all(len(tensor) == len(numbers) for tensor in batch.values())


def test_fewer_ids_may_be_read(tiny_cache: Params) -> None:
    whole, first = dataset_of(tiny_cache), dataset_of(tiny_cache, k=5)
    assert torch.equal(whole[2]["teacher_ids"][:, :5], first[2]["teacher_ids"])


def test_numbers_are_those_of_a_sequence(tiny_cache: Params) -> None:
    dataset = dataset_of(tiny_cache, "validation")
    assert torch.equal(dataset[-1]["input_ids"], dataset[len(dataset) - 1]["input_ids"])
    with pytest.raises(IndexError, match="row"):
        dataset[len(dataset)]
    assert len(list(dataset)) == len(dataset)


def test_transformers_keeps_documents_apart(tiny_cache: Params) -> None:
    """The hidden states of a packed document are those it has alone."""
    dataset = dataset_of(tiny_cache)
    model = AutoModelForCausalLM.from_pretrained(tiny_cache.paths.teacher).train()
    row = next(row for row in dataset if row["doc_ids"].unique().numel() > 1)
    last = row["doc_ids"] == row["doc_ids"].max()
    batch = collate([row])
    assert "position_ids" in batch
    together = model(**model_inputs(batch)).logits[0, last]
    alone = model(input_ids=row["input_ids"][last][None]).logits[0]
    assert torch.allclose(together, alone, atol=1e-5)


def test_rows_without_document_mask_have_no_positions(tiny_corpus: Params) -> None:
    params = change(tiny_corpus, prepare={"document_mask": False})
    capture_all(params)
    assert "position_ids" not in dataset_of(params)[0]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_open_the_cache_anew(method: str, tiny_cache: Params) -> None:
    dataset = dataset_of(tiny_cache)
    sampler = ShardSampler(dataset, seed=3)
    loader = DataLoader(
        dataset,
        batch_size=5,
        sampler=sampler,
        collate_fn=collate,
        num_workers=2,
        multiprocessing_context=multiprocessing.get_context(method),
    )
    here = DataLoader(dataset, batch_size=5, sampler=sampler, collate_fn=collate)
    for one, two in zip(loader, here, strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_dataset_survives_pickling(tiny_cache: Params) -> None:
    dataset = dataset_of(tiny_cache)
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[1]["teacher_ids"], dataset[1]["teacher_ids"])


def test_the_sampler_has_the_order_of_training(tiny_cache: Params) -> None:
    dataset = dataset_of(tiny_cache)
    sampler = ShardSampler(dataset, seed=5, shuffle_shards=2)
    order = ShuffledRows(len(dataset), shard_rows=16, window_shards=2, seed=5)
    assert list(sampler) == order.at(0, len(dataset)).tolist()
    sampler.set_epoch(2)
    assert list(sampler) == order.at(2 * len(dataset), len(dataset)).tolist()
    assert sorted(sampler) == list(range(len(dataset)))
    assert len(sampler) == len(dataset)


def key_of(row: Row) -> tuple[int, ...]:
    return tuple(row["input_ids"].flatten().tolist())


def test_a_stream_gives_each_row_to_one_process(tiny_cache: Params) -> None:
    dataset = dataset_of(tiny_cache)
    rows = sorted(map(key_of, dataset))
    alone = IterableCacheDataset(dataset, seed=1)
    assert [key_of(row) for row in alone] == [
        key_of(dataset[number]) for number in ShardSampler(dataset, seed=1)
    ]
    parts = [
        [
            key_of(row)
            for batch in DataLoader(
                IterableCacheDataset(dataset, seed=1, rank=rank, world_size=3),
                batch_size=1,
                num_workers=workers,
            )
            for row in [{"input_ids": batch["input_ids"]}]
        ]
        for workers in (0, 2)
        for rank in range(3)
    ]
    for found, workers in ((parts[:3], 1), (parts[3:], 2)):
        size = len(dataset) // (3 * workers) * workers
        assert [len(part) for part in found] == [size] * 3
        taken = [row for part in found for row in part]
        assert len(set(taken)) == len(taken)
        assert set(taken) <= set(rows)


def test_a_stream_reads_each_shard_once(tiny_cache: Params) -> None:
    """But for the shards in which one process's part ends and another's begins."""
    dataset = dataset_of(tiny_cache)
    read: list[int] = []
    shard = dataset._shard
    dataset._shard = lambda number: (read.append(number), shard(number))[1]
    for rank in range(2):
        list(IterableCacheDataset(dataset, seed=1, shuffle_shards=1, rank=rank, world_size=2))
    runs = [number for place, number in enumerate(read) if place == 0 or number != read[place - 1]]
    assert len(runs) <= dataset._reader.layout.num_shards + 1


def test_a_stream_continues_after_its_last_row(tiny_cache: Params) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    for workers in (0, 2):
        loaders = [
            torchdata.StatefulDataLoader(
                IterableCacheDataset(dataset_of(tiny_cache), seed=1),
                batch_size=3,
                num_workers=workers,
                collate_fn=collate,
            )
            for _ in range(2)
        ]
        loaders[0].dataset.set_epoch(2)
        batches = iter(loaders[0])
        begun = [key_of(next(batches)) for _ in range(4)]
        state = loaders[0].state_dict()
        rest = [key_of(batch) for batch in batches]
        loaders[1].load_state_dict(state)
        assert [key_of(batch) for batch in loaders[1]] == rest
        assert rest
        assert not set(begun) & set(rest)


def test_after_a_whole_epoch_the_next_one_is_whole(tiny_cache: Params) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    loaders = [
        torchdata.StatefulDataLoader(
            IterableCacheDataset(dataset_of(tiny_cache), seed=1), batch_size=8, collate_fn=collate
        )
        for _ in range(2)
    ]
    batches = len(list(loaders[0]))
    loaders[1].load_state_dict(loaders[0].state_dict())
    loaders[1].dataset.set_epoch(1)
    found = [key_of({"input_ids": row}) for b in loaders[1] for row in b["input_ids"]]
    assert -(-len(found) // 8) == batches
    sampler = ShardSampler(dataset_of(tiny_cache), seed=1)
    sampler.set_epoch(1)
    dataset = dataset_of(tiny_cache)
    assert found == [key_of(dataset[number]) for number in sampler]


def test_a_cache_that_changes_meanwhile_is_refused(tiny_cache: Params) -> None:
    """As on a branch of the hub: a process that opens it later would read another state."""
    dataset = dataset_of(tiny_cache)
    state = dataset.__getstate__() | {"_made_from": replace(dataset.fingerprint, k=7)}
    with pytest.raises(MismatchError, match="has changed since it was opened"):
        CacheDataset.__new__(CacheDataset).__setstate__(state)


def test_a_state_of_other_processes_is_refused(tiny_cache: Params) -> None:
    stream = IterableCacheDataset(dataset_of(tiny_cache), seed=1, rank=0, world_size=2)
    state = stream.state_dict()
    other = IterableCacheDataset(dataset_of(tiny_cache), seed=1, rank=0, world_size=3)
    other.load_state_dict(state)
    assert other.state_dict() == state
    with pytest.raises(ParamsError, match="saved by 2 processes that read, now there are 3"):
        next(iter(other))
    many = IterableCacheDataset(dataset_of(tiny_cache), seed=1, rank=0, world_size=10_000)
    with pytest.raises(ParamsError, match="rows cannot be divided among 10000 processes"):
        next(iter(many))


def test_damage_and_wrong_addresses_are_one_sentence(tiny_cache: Params, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="the scheme ftp:// is not known"):
        CacheDataset("ftp://somewhere", str(tiny_cache.paths.logits))
    with pytest.raises(MismatchError, match="does not exist"):
        CacheDataset(str(tiny_cache.paths.corpus), str(tmp_path / "none"))
    dataset = dataset_of(tiny_cache)
    for file in Path(str(tiny_cache.paths.logits)).glob("train/lse/c/0/*"):
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(MismatchError, match=r"shard 0 of .* is damaged"):
        dataset[0]
