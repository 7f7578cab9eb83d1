"""SIGKILL at random moments over a capture by two processes: nothing bad is ever committed."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from pipeline.capture.local import part_of
from pipeline.config.params import Params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.io.folders import LocalFolder
from pipeline.logit_cache.integrity import check_cache
from tests.helpers import capture_all, change, make_capture
from tests.waiting import PATIENCE

KILLS = 52
PROCESSES = 2


def capture_part(params: Params, part: int) -> None:
    """What `stages/prepare.py --shards PART/2` does."""
    torch.set_num_threads(1)
    capture = make_capture(params, "train")
    capture.run(part_of(capture.writer.missing(), part, PROCESSES))


def test_fifty_kills(
    tiny_corpus: Params, tmp_path: Path, forkserver: multiprocessing.context.ForkServerContext
) -> None:
    params = change(
        tiny_corpus,
        prepare={"shard_rows": 1, "chunk_rows": 1, "k": 8, "num_sampled": 4},
        capture={"batch_rows": 1},
        paths={"logits": str(tmp_path / "killed.zarr")},
    )
    corpus = CorpusSplit(params.paths.corpus, "train")
    chance = random.Random(0)
    kills, committed, progress, turn = 0, 0, 0, 0
    while kills < KILLS:
        parts = [
            forkserver.Process(target=capture_part, args=(params, part), daemon=True)
            for part in range(1, PROCESSES + 1)
        ]
        for process in parts:
            process.start()
        chance.shuffle(parts)
        # By turns at any moment, which on a slow machine is before the first shard, and soon after
        # a shard was committed, which takes some milliseconds; the second process goes on a little
        # while the first is dead.
        turn += 1
        if turn % 2:
            before = committed_markers(params)
            while parts[0].is_alive() and committed_markers(params) == before:
                parts[0].join(0.002)
        for process, longest in zip(parts, (0.1 if turn % 2 else 1.2, 0.3), strict=True):
            process.join(chance.uniform(0.0, longest))
            if process.is_alive():
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        for process in parts:
            process.join(PATIENCE)
            assert process.exitcode in (0, -signal.SIGKILL)
        result = check_cache(params.paths.logits, corpus)
        if (params.paths.logits / "train" / "zarr.json").exists():
            assert result.damages == ()
            assert result.committed >= committed
            progress += result.committed > committed
            committed = result.committed
            if not result.missing:  # a complete cache cannot be hurt: begin another
                assert_same_as_undisturbed(params, tmp_path)
                params = change(params, paths={"logits": str(tmp_path / f"after{kills}.zarr")})
                committed = 0
    assert progress > 5
    capture_all(params)
    assert check_cache(params.paths.logits, corpus).damages == ()
    assert_same_as_undisturbed(params, tmp_path)


def committed_markers(params: Params) -> set[str]:
    return {file.name for file in (params.paths.logits / "train" / "commits").glob("0*.json")}


def assert_same_as_undisturbed(params: Params, folder: Path) -> None:
    """Array by array what a capture by one process gives that nobody disturbs."""
    undisturbed = change(params, paths={"logits": str(folder / "undisturbed.zarr")})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of summation follows the number of threads
    capture_all(undisturbed)
    torch.set_num_threads(threads)
    groups = [
        zarr.open_group(p.paths.logits, path="train", mode="r") for p in (params, undisturbed)
    ]
    one, two = ({n: np.asarray(a[:]) for n, a in group.arrays()} for group in groups)
    assert one.keys() == two.keys()
    for name, values in one.items():
        assert np.array_equal(values, two[name]), name


def test_killed_before_the_marker_a_shard_does_not_exist(tiny_corpus: Params) -> None:
    """Objects of a shard written, marker not: it is missing, and written again over them."""
    params = change(tiny_corpus, prepare={"shard_rows": 4})
    capture = make_capture(params, "train")
    capture.run([0, 1])
    capture.writer.drop(1)
    again = make_capture(params, "train")
    assert again.writer.missing()[0] == 1
    again.run(again.writer.missing())
    corpus = CorpusSplit(params.paths.corpus, "train")
    assert check_cache(params.paths.logits, corpus).damages == ()


def test_a_write_that_fails_at_any_object_leaves_no_shard(
    tiny_corpus: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marker comes last: before it, whatever else is written, the shard does not exist."""
    params = change(tiny_corpus, prepare={"shard_rows": 4})
    capture = make_capture(params, "train")
    corpus = CorpusSplit(params.paths.corpus, "train")
    computed = capture.compute(0)
    write, objects = LocalFolder.write, len(capture.writer.layout.specs) + 1
    for failing in range(objects):
        writes = iter(range(objects))

        def fails(self: LocalFolder, key: str, data: bytes) -> None:
            if next(writes) == failing:  # noqa: B023
                raise OSError(errno.ENOSPC, "full")
            write(self, key, data)

        with monkeypatch.context() as patch:
            patch.setattr(LocalFolder, "write", fails)
            with pytest.raises(OSError, match="full"):
                capture.write(computed)
        assert not capture.writer.is_committed(0), f"committed before object {failing}"
        assert check_cache(params.paths.logits, corpus).damages == ()
    capture.write(computed)
    assert capture.writer.is_committed(0)
