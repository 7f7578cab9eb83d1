"""Folders on a disk and in an object store behave alike; a bad server costs time, never data."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.params import Params
from pipeline.data.corpus import build_corpus
from pipeline.data.corpus_zarr import SPLITS, CorpusSplit, chain_rows
from pipeline.errors import DecantError, MismatchError
from pipeline.export.shared_files import open_whole, shared_files
from pipeline.io import object_store, retries
from pipeline.io.address import Url, parse_address
from pipeline.io.folders import Folder, open_folder
from pipeline.logit_cache.integrity import check_cache
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.run import run_training
from tests.helpers import capture_all, change, gate, open_cache
from tests.training.ranks import run_ranks

pytest.importorskip("obstore")
moto_server = pytest.importorskip("moto.server")

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Server:
    """S3 on the loopback, which counts requests and can be told to misbehave."""

    def __init__(self) -> None:
        from werkzeug.serving import make_server

        self._app: Application = moto_server.DomainDispatcherApplication(
            moto_server.create_backend_app
        )
        self.requests: Counter[str] = Counter()
        self.misbehave: Callable[[int], str | None] = lambda number: None
        self._number = 0
        self._lock = threading.Lock()
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.port}"

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        with self._lock:
            self._number += 1
            number = self._number
            self.requests[environ["REQUEST_METHOD"]] += 1
        how = self.misbehave(number)
        if how in ("fail", "refuse"):
            status = "503 Slow Down" if how == "fail" else "403 Forbidden"
            start_response(status, [("Content-Length", "0")])
            return []
        if how == "stall":
            time.sleep(3.0)
        if how == "stop":  # in the middle of a body: the length is promised, not kept
            body = b"".join(self._app(environ, start_response))
            return self._half(body)
        return self._app(environ, start_response)

    def _half(self, body: bytes) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        time.sleep(3.0)

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.stop()


@pytest.fixture
def bucket(server: Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Url:
    """An empty bucket; quick back-off, so that tests do not sleep."""
    import boto3

    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.url,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.02)
    monkeypatch.setitem(object_store._CLIENT, "timeout", timedelta(seconds=1))
    server.misbehave = lambda number: None
    name = f"bucket{abs(hash(request.node.nodeid)) % 10**9}"
    boto3.client("s3", endpoint_url=server.url, region_name="us-east-1").create_bucket(Bucket=name)
    server.requests.clear()
    return Url(f"s3://{name}/some/prefix")


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "disk":
        return open_folder(tmp_path / "folder")
    return open_folder(request.getfixturevalue("bucket"))


def test_what_is_written_is_read_listed_and_removed(folder: Folder) -> None:
    with pytest.raises(FileNotFoundError):
        folder.read("a/b")
    folder.write("a/b", b"one")
    folder.write("a/b", b"three")
    folder.write("a/c/d", bytes(10))
    folder.write("e", b"")
    assert folder.read("a/b") == b"three"
    assert folder.sizes() == {"a/b": 5, "a/c/d": 10, "e": 0}
    assert folder.sizes("a/c") == {"a/c/d": 10}
    assert folder.sizes("nothing") == {}
    folder.remove("a/b")
    folder.remove("a/b")
    assert folder.sizes("a") == {"a/c/d": 10}
    folder.remove()
    folder.remove()
    assert folder.sizes() == {}


def test_folders_that_are_being_made_are_not_listed(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    folder.write("step_1/state.json", b"{}")
    folder.write("step_2.partial/state.json", b"{}")
    assert folder.sizes() == {"step_1/state.json": 2}


def test_of_many_creators_one_wins(folder: Folder) -> None:
    won: list[int] = []

    def create(number: int) -> None:
        if folder.create("group", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert folder.read("group") == str(won[0]).encode()


def test_a_listing_bears_with_what_others_write_and_remove(tmp_path: Path) -> None:
    folder, stop = open_folder(tmp_path), threading.Event()
    folder.write("stays/a", b"1")

    def churn() -> None:
        while not stop.is_set():
            folder.write("comes/b/c", b"2")
            folder.write("stays/d", b"3")
            folder.remove("comes")
            folder.remove("stays/d")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(2000):
            found = folder.sizes()
            assert found["stays/a"] == 1
            assert set(found) <= {"stays/a", "stays/d", "comes/b/c"}
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("how", ["fail", "stall", "stop"])
def test_a_bad_server_costs_time_not_data(how: str, server: Server, bucket: Url) -> None:
    folder = open_folder(bucket)
    content = {f"key{i}": np.random.default_rng(i).bytes(30_000) for i in range(12)}
    every = 10 if how == "fail" else 9
    server.misbehave = lambda number: how if number % every == 0 else None
    for key, data in content.items():
        folder.write(key, data)
    for key, data in content.items():
        assert folder.read(key) == data
    assert folder.sizes() == dict.fromkeys(content, 30_000)


def test_a_server_that_never_works_is_one_sentence(server: Server, bucket: Url) -> None:
    server.misbehave = lambda number: "fail"
    with pytest.raises(DecantError, match=r"cannot read s3://\S+/key, on attempt 6 .*endpoint"):
        open_folder(bucket).read("key")


def test_a_refusal_is_not_tried_again(server: Server, bucket: Url) -> None:
    server.misbehave = lambda number: "refuse"
    with pytest.raises(DecantError, match=r"cannot read .*, on attempt 1 .*credentials"):
        open_folder(bucket).read("key")
    assert server.requests["GET"] == 1


def test_an_absent_bucket_holds_nothing(bucket: Url) -> None:
    absent = Url(str(bucket).replace("bucket", "nobucket", 1))
    with pytest.raises(FileNotFoundError):
        open_folder(absent).read("key")


def test_addresses() -> None:
    assert parse_address("cache/x") == Path("cache/x")
    url = parse_address("s3://bucket/a/")
    assert isinstance(url, Url)
    assert url / "b" == "s3://bucket/a/b"
    assert (url / "b").name == "b"
    with pytest.raises(ValueError, match="scheme https:// is not known"):
        parse_address("https://host/x")


@pytest.mark.parametrize("how", [None, "fail"])
def test_capture_check_and_train_in_an_object_store(
    how: str | None, server: Server, bucket: Url, tiny_params: Params
) -> None:
    """Corpus and cache at s3://: the same numbers as on a disk, one request per object."""
    server.misbehave = lambda number: how if number % 10 == 0 else None
    remote = change(
        tiny_params, paths={"corpus": str(bucket / "corpus"), "logits": str(bucket / "logits")}
    )
    for params in (tiny_params, remote):
        build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
        capture_all(params)
    for split in SPLITS:
        corpus = CorpusSplit(remote.paths.corpus, split)
        server.requests.clear()
        result = check_cache(remote.paths.logits, corpus)
        assert (result.damages, result.missing) == ((), 0)
        if how is None:
            # Group, 5 arrays' metadata, id order, 3 corpus arrays, listing; and of each shard
            # a marker and 5 arrays.
            assert server.requests["GET"] <= 13 + 6 * result.shards
        rows = np.arange(len(corpus))
        stored = open_cache(remote, split).top_k(rows)
        local = open_cache(tiny_params, split).top_k(rows)
        for name, tensor in vars(local).items():
            if isinstance(tensor, torch.Tensor):
                assert torch.equal(tensor, getattr(stored, name)), name
    if how is None:  # what stages/share.py would publish of both
        here, there = (
            {path: file.read() for path, file in shared_files(p, open_whole(p), None).items()}
            for p in (tiny_params.paths, remote.paths)
        )
        assert here == there
    assert gate(remote).passed
    server.requests.clear()
    away = run_training(remote, "there").state
    reads = server.requests["GET"]
    home = run_training(tiny_params, "here").state
    assert home is not None
    assert away is not None
    for one, two in zip(home.history, away.history, strict=True):
        for name in ("train/loss", "validation/loss"):
            assert one.get(name) == two.get(name)
    if how is None:  # 8 steps of 4 rows see 32 of 94 rows; no object is read twice in a window
        assert reads <= 120


def test_a_corpus_grows_in_an_object_store(bucket: Url, tiny_params: Params) -> None:
    remote = change(tiny_params, paths={"corpus": str(bucket / "corpus")})
    infos = []
    for params in (tiny_params, remote):
        corpus, address = params.corpus, params.paths.corpus
        teacher = params.paths.teacher
        few = change(params, corpus={"train_tokens": 1500}).corpus
        before = build_corpus(few, teacher, address)
        infos.append(build_corpus(corpus, teacher, address, append=True))
        rows = CorpusSplit(address, "train").rows(0, infos[-1]["train"].num_rows)
        assert chain_rows(rows) == infos[-1]["train"].sha256
        assert chain_rows(rows[: before["train"].num_rows]) == before["train"].sha256
    assert infos[0] == infos[1]


def save_twice(saved: list[str]) -> Callable[..., None]:
    """`Checkpoints.save` that lists what it saved and stops the run at the second."""
    save = Checkpoints.save

    def stopping(self: Checkpoints, *what: Any) -> None:
        save(self, *what)
        saved.append(self.names()[-1])
        if len(saved) == 2:
            raise KeyboardInterrupt

    return stopping


def test_a_run_is_taken_over_by_another_machine(
    server: Server,
    bucket: Url,
    tiny_cache: Params,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Checkpoints at s3://; the first machine and its disk are lost after the second one."""
    server.misbehave = lambda number: "fail" if number % 10 == 0 else None
    monkeypatch.setattr(checkpoint, "_PART", 100_000)  # bytes per object: several per file
    alone = run_training(tiny_cache, "student")
    first = change(
        tiny_cache, paths={"checkpoints": str(bucket / "runs"), "runs": str(tmp_path / "lost")}
    )
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_twice(saved := []))
        with pytest.raises(KeyboardInterrupt):
            run_training(first, "student")
    second = change(first, paths={"runs": str(tmp_path / "second")})
    with pytest.raises(MismatchError, match=r"train\.alpha=0\.5, now 0\.25"):
        run_training(change(second, train={"alpha": 0.25}), "student")
    assert saved == ["step_00000002", "step_00000004"]
    folder = open_folder(bucket / "runs" / "student")
    parts = sorted(key for key in folder.sizes() if "step_00000004/__0_0.distcp" in key)
    assert len(parts) > 3
    folder.write(parts[1], folder.read(parts[1])[:-1] + b"!")
    resumed = run_training(second, "student")
    said = capsys.readouterr().out
    assert "step_00000004 is damaged (__0_0.distcp" in said
    assert "continuing from step 2 of 8" in said
    assert open_folder(bucket / "runs").sizes() == {}
    one, two = (load_file(r.folder / "model" / "model.safetensors") for r in (alone, resumed))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def train_and_stop(params: Params, environment: dict[str, str]) -> None:
    os.environ |= environment
    Checkpoints.save = save_twice([])  # type: ignore[method-assign]
    with contextlib.suppress(KeyboardInterrupt):
        run_training(params, "student")


def test_two_ranks_save_to_an_object_store_and_one_continues(
    server: Server, bucket: Url, tiny_cache: Params, tmp_path: Path, forkserver: ForkServerContext
) -> None:
    alone = run_training(tiny_cache, "student")
    paths = {"checkpoints": str(bucket / "runs"), "runs": str(tmp_path / "other")}
    sharded = change(tiny_cache, paths=paths, run={"parallel": "fsdp"})
    access = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    run_ranks(forkserver, 2, train_and_stop, sharded, access)
    keys = open_folder(bucket / "runs" / "student" / "step_00000004").sizes()
    assert {"__0_0.distcp/00000", "__1_0.distcp/00000", "complete.json"} <= keys.keys()
    resumed = run_training(sharded, "student")
    one, two = (load_file(r.folder / "model" / "model.safetensors") for r in (alone, resumed))
    assert all(torch.allclose(tensor, two[name], atol=1e-5) for name, tensor in one.items())
