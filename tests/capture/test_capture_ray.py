"""Capture on a Ray cluster: two actors, one of them killed, against the local engine's store.

One cluster serves all tests. An actor takes seconds to import its libraries.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from pipeline.capture import ray
from pipeline.capture.local import capture_locally
from pipeline.capture.ray import CaptureActor, capture_on_ray
from pipeline.config.params import Params
from pipeline.data.corpus import build_corpus
from pipeline.data.corpus_zarr import SPLITS, CorpusSplit
from pipeline.errors import DecantError, MismatchError, ParamsError
from pipeline.io.files import create_bytes
from pipeline.io.folders import LocalFolder
from pipeline.logit_cache.format import marker_key
from pipeline.logit_cache.integrity import check_cache
from pipeline.runtime.optional import import_ray
from tests.helpers import ROOT, RunPython, change
from tests.models import make_teacher

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a cluster with two processors."""
    import_ray()
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def cluster(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster is the one that a capture joins."""
    monkeypatch.setenv("RAY_ADDRESS", address)


@pytest.fixture
def many_shards(tiny_corpus: Params) -> Params:
    """24 shards to train on and 5 to validate."""
    return change(tiny_corpus, prepare={"shard_rows": 4}, capture={"batch_rows": 2})


def arrays_of(params: Params, split: str) -> dict[str, np.ndarray]:
    group = zarr.open_group(params.paths.logits / split, mode="r")
    return {name: np.asarray(array[:]) for name, array in group.arrays()}


def require_same_as_local(params: Params, *, threads: int = 1) -> None:
    """The cache is whole, and array by array what a local capture makes.

    Args:
        threads: of an actor; another number may change a sum's last bit.
    """
    local = change(params, paths={"logits": str(params.paths.logits.with_name("local.zarr"))})
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        capture_locally(local)
    finally:
        torch.set_num_threads(before)
    for split in SPLITS:
        check = check_cache(params.paths.logits, CorpusSplit(params.paths.corpus, split))
        assert (check.damages, check.missing) == ((), 0)
        made, expected = arrays_of(params, split), arrays_of(local, split)
        assert made.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(made[name], expected[name], err_msg=name)


def test_two_actors_make_the_local_store(
    cluster: None, many_shards: Params, tmp_path: Path, stage: RunPython
) -> None:
    """By the stage, with a cache at a relative path, since actors work elsewhere."""
    words = ["--actors", "2", "--set", "paths.logits=cache/logits.zarr"]
    done = stage(tmp_path, *words, "--set", "prepare.shard_rows=4", "--set", "capture.batch_rows=2")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"prepare: 2 actors capture 3,616 tokens in 29 shards\n"
        r"prepare: 3,616 tokens captured in \d+ s, 29 of 29 shards new; cache/logits.zarr holds "
        r"the top 16 of 3,616 positions \([\d.]+% in the loss\), [\d.]+ bytes per token, "
        r"from a teacher in float32\n",
        done.stdout,
    )
    require_same_as_local(many_shards)


def test_killed_actors_change_nothing(
    cluster: None, many_shards: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL with a shard written but not committed, and with one committed but not reported."""

    class MortalActor(CaptureActor):
        def __init__(self, *words: Any) -> None:
            super().__init__(*words)
            write = LocalFolder.write

            def write_and_die(folder: LocalFolder, key: str, data: bytes) -> None:
                if key == marker_key(7):
                    die_once("before")
                write(folder, key, data)
                if key == marker_key(11):
                    die_once("after")

            LocalFolder.write = write_and_die  # type: ignore[method-assign]

    def die_once(name: str) -> None:
        if create_bytes(tmp_path / name, b""):
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            create_bytes(tmp_path / f"{name}, again", b"")

    monkeypatch.setattr(ray, "CaptureActor", MortalActor)
    results = capture_on_ray(many_shards, actors=2)
    assert [result.shards_done for result in results] == [24, 5]
    assert (tmp_path / "before, again").exists()  # Ray repeated the shard
    assert (tmp_path / "after").exists()
    assert not (tmp_path / "after, again").exists()  # it was confirmed, not written again
    require_same_as_local(many_shards)


def test_actor_lost_again_and_again_is_one_sentence(
    cluster: None, many_shards: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    class DyingActor(CaptureActor):
        def capture_shard(self, split: str, shard: int) -> int:
            if shard == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().capture_shard(split, shard)

    monkeypatch.setattr(ray, "CaptureActor", DyingActor)
    monkeypatch.setattr(ray, "_RESTARTS", 0)
    with pytest.raises(DecantError, match=r"^Ray lost the capture \(.* run the same command"):
        capture_on_ray(many_shards, actors=1)


def test_an_actor_can_be_an_engine_of_vllm(
    cluster: None, many_shards: Params, vllm_python: Path
) -> None:
    params = change(
        many_shards, prepare={"engine": "vllm", "vllm": {"python": str(vllm_python), "options": {}}}
    )
    capture_on_ray(params, actors=1)
    require_same_as_local(params, threads=min(2, os.cpu_count() or 1))


class GpuCluster:
    """What is asked of Ray when actors are started: machines with 4 and with 3 GPUs."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 16.0, "GPU": 7.0}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": float(n)}} for n in (4, 3)]

    def remote(self, actor: type) -> GpuCluster:
        return self

    def options(self, **options: Any) -> Any:
        return SimpleNamespace(remote=lambda *_: self.started.append(options))


@pytest.mark.parametrize(("size", "actors"), [(1, 7), (2, 3), (4, 1)])
def test_an_engine_takes_its_gpus_from_one_machine(
    size: int, actors: int, tiny_params: Params
) -> None:
    options = {"tensor_parallel_size": size}
    params = change(
        tiny_params, prepare={"engine": "vllm", "vllm": {"python": None, "options": options}}
    )
    params = params.model_copy(update={"device": "auto"})
    cluster = GpuCluster()
    ray._start_actors(cluster, params, None)
    assert [started["num_gpus"] for started in cluster.started] == [size] * actors
    with pytest.raises(
        ParamsError, match=rf"^--actors {actors + 1}( of \d GPUs each)? exceeds the "
    ):
        ray._start_actors(cluster, params, actors + 1)


def test_an_engine_larger_than_a_machine_is_refused(tiny_params: Params) -> None:
    vllm = {"python": None, "options": {"tensor_parallel_size": 3, "pipeline_parallel_size": 2}}
    params = change(tiny_params, prepare={"engine": "vllm", "vllm": vllm})
    with pytest.raises(
        ParamsError, match=r"^prepare\.vllm\.options asks for 6 GPUs of one machine"
    ):
        ray._start_actors(GpuCluster(), params.model_copy(update={"device": "auto"}), None)


def test_actors_error_keeps_its_kind(cluster: None, tiny_cache: Params, tmp_path: Path) -> None:
    make_teacher(tmp_path / "other", seed=1)
    other = change(tiny_cache, paths={"teacher": str(tmp_path / "other")})
    with pytest.raises(MismatchError, match=r"^\S* was made with teacher_sha256=\S*, wanted is"):
        capture_on_ray(other)


@pytest.fixture
def stage(run_python: RunPython) -> RunPython:
    """stages/prepare.py, run in a folder."""

    def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
        return run_python(str(ROOT / "stages/prepare.py"), "--executor", "ray", *words, cwd=folder)

    return run


def test_damage_is_repaired(
    cluster: None, tiny_cache: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny_cache.paths.logits / "train/lse/c/2/0").write_bytes(b"damaged")
    results = capture_on_ray(tiny_cache, repair=True)
    assert [result.shards_done for result in results] == [1, 0]
    assert re.search(r"^prepare: train shard 2: .*; repaired$", capsys.readouterr().out, re.M)
    require_same_as_local(tiny_cache)


def test_rows_that_were_added_are_captured(cluster: None, tiny_params: Params) -> None:
    """The short last shard is completed, its old rows are not captured again."""
    params = change(tiny_params, corpus={"train_tokens": 1500})
    build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    capture_locally(params)
    build_corpus(tiny_params.corpus, params.paths.teacher, params.paths.corpus, append=True)
    [train, validation] = capture_on_ray(params, actors=2, overwrite=True)
    assert (train.tokens_done, train.shards_done) == ((94 - 47) * 32, 4)
    assert validation.tokens_done == 0
    check = check_cache(params.paths.logits, CorpusSplit(params.paths.corpus, "train"))
    assert (check.damages, check.missing) == ((), 0)


def test_stage_refuses(
    cluster: None, tiny_corpus: Params, tmp_path: Path, stage: RunPython
) -> None:
    for words, sentence in [
        (["--set", "prepare.k=301"], "prepare.k=301 exceeds the 300 ids of the vocabulary"),
        (["--shards", "1/2"], "--shards 1/2 and --executor ray both divide the work"),
        (["--actors", "3"], "--actors 3 exceeds the Ray cluster's 2 processors"),
        (["--executor", "local", "--actors", "2"], "--actors 2 needs --executor ray"),
    ]:
        done = stage(tmp_path, *words)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith(f"error: {sentence}")
        assert len(done.stderr.splitlines()) == 1
