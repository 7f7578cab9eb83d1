"""Corpus and cache published to a stand-in for the hub, and read and trained on from there."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from huggingface_hub import constants, snapshot_download

from pipeline.config.params import Params, load_params
from pipeline.data.corpus_zarr import SPLITS, CorpusSplit
from pipeline.errors import DecantError, MismatchError, ParamsError
from pipeline.export import push_dataset
from pipeline.export.shared_files import GROUPS
from pipeline.io import hub_folder, retries
from pipeline.io.address import HubUrl, parse_address
from pipeline.io.folders import LocalFolder, open_folder
from pipeline.logit_cache.integrity import check_cache
from pipeline.logit_cache.reader import CacheReader
from pipeline.training.run import run_training
from stages import corpus, prepare, share, train, verify
from tests.export.hub import Hub, hub_of_this_process
from tests.helpers import ROOT, SMALL, capture_all, change

REPO = "some-org/tiny-logits"
ADDRESS = f"hf://datasets/{REPO}"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with hub_of_this_process(tmp_path / "hub") as running:
        yield running


def run_share(params: Path, *words: str) -> Result:
    command = ["--params", str(params), "--push", REPO, *words]
    return CliRunner().invoke(share.main, command, catch_exceptions=False)


def pushed(folder: Path) -> str:
    """Push what the params of a folder name, and return the commit."""
    done = run_share(folder / "params.yaml")
    assert done.exit_code == 0, done.output
    found = re.findall(rf"paths\.(?:corpus|logits): {ADDRESS}@([0-9a-f]{{40}})\n", done.output)
    assert len(found) == 2
    hub_folder._snapshot.cache_clear()  # as in another process
    return found[0]


def from_hub(params: Params, revision: str = "") -> Params:
    return change(params, paths=dict.fromkeys(("corpus", "logits"), ADDRESS + revision))


def history(params: Params, run: str) -> list[tuple[float | None, ...]]:
    state = run_training(params, run).state
    assert state is not None
    names = ("train/loss", "validation/loss")
    return [tuple(record.get(name) for name in names) for record in state.history]


def test_what_is_published_trains_as_what_is_here(
    hub: Hub, tiny_cache: Params, tmp_path: Path
) -> None:
    few_steps = change(tiny_cache, train={"steps": 4})
    here = history(few_steps, "here")
    pushed(tmp_path)
    assert hub.repositories[REPO]["visibility"] == "private"
    assert hub.repositories[REPO]["type"] == "dataset"
    for tree, folder in (("corpus.zarr", "corpus"), ("logits.zarr", "logits")):
        sent = {path: data for path, data in hub.files.items() if path.startswith(f"{tree}/")}
        store = LocalFolder(getattr(tiny_cache.paths, folder))
        kept = store.sizes().keys() - {"source.json"}
        assert sent == {f"{tree}/{key}": store.read(key) for key in kept}
    hub.requests.clear()
    there = from_hub(few_steps)
    assert history(there, "there") == here
    for split in SPLITS:
        result = check_cache(there.paths.logits, CorpusSplit(there.paths.corpus, split))
        assert (result.damages, result.missing) == ((), 0)
        assert CacheReader(there.paths.logits, CorpusSplit(there.paths.corpus, split))
    reads = Counter(request for request in hub.requests if request.startswith("GET"))
    assert set(reads.values()) == {1}  # the revision, each page of one listing, each file
    pages = -(-len(hub.files) // 40)
    assert sum("/tree/" in request for request in reads) in range(pages, 4 * pages)

    hub.requests.clear()  # without a network, from the copy on disk
    hub_folder._snapshot.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert history(there, "offline") == here
    assert not hub.requests


def test_without_a_network_what_is_not_there_is_one_sentence(
    hub: Hub, tiny_cache: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = pushed(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DecantError, match=f"revision main of .* {REPO} could not be opened"):
        open_folder(HubUrl(ADDRESS))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = open_folder(HubUrl(f"{ADDRESS}@{commit}/corpus.zarr/train"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = r"train/zarr\.json could not be downloaded, on attempt 1 .*`hf download hf://\S+/`$"
    with pytest.raises(DecantError, match=message):
        folder.read("zarr.json")


def test_damage_is_one_sentence_and_its_remedy_works(
    hub: Hub, tiny_cache: Params, tmp_path: Path
) -> None:
    pushed(tmp_path)
    there = from_hub(tiny_cache)
    path = "logits.zarr/train/id_indices/c/1/0"
    [(sha256, data)] = [item for item in hub.blobs.items() if item[1] == hub.files[path]]
    hub.blobs[sha256] = bytes([data[0] ^ 1]) + data[1:]  # on its way: the listing has its sha256
    corpus_of = CorpusSplit(there.paths.corpus, "train")
    reader = CacheReader(there.paths.logits, corpus_of)
    again = rf"`hf download {ADDRESS}/logits\.zarr/train/ --force-download`"
    message = f"shard 1 of {ADDRESS}/logits.zarr/train is damaged .*: download it again by {again}"
    with pytest.raises(MismatchError, match=message):
        reader.shard(1)
    done = CliRunner().invoke(
        verify.main, ["--params", str(write_params(there, tmp_path)), "--structure"]
    )
    assert done.exit_code == 1
    assert "train shard 1: id_indices/c/1/0 does not match its hash" in done.output
    assert "NOT intact; download it again by `hf download" in done.output
    hub.blobs[sha256] = data
    snapshot_download(
        REPO, repo_type="dataset", allow_patterns=["logits.zarr/train/*"], force_download=True
    )
    assert reader.shard(1).first == 16
    cut = next((tmp_path / "hub").glob("*/snapshots/*/corpus.zarr/train/tokens/c/0/0"))
    cut.resolve().write_bytes(cut.read_bytes()[:-1])
    message = f"shard 0 of {ADDRESS}/corpus.zarr/train is damaged .*/corpus.zarr/train/ --force"
    with pytest.raises(DecantError, match=message):
        CorpusSplit(there.paths.corpus, "train").rows(0, 1)


def write_params(params: Params, folder: Path) -> Path:
    file = folder / "of_the_hub.yaml"
    file.write_text(yaml.safe_dump(params.model_dump(mode="json")))
    return file


def test_a_failing_server_costs_time_not_data(
    hub: Hub, tiny_cache: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.01)
    pushed(tmp_path)
    folder = open_folder(HubUrl(f"{ADDRESS}/corpus.zarr"))
    number = 0

    def every_other(method: str, path: str) -> int | None:
        nonlocal number
        number += method == "GET"
        return 503 if method == "GET" and number % 2 else None

    hub.misbehave = every_other
    for key in ("train/zarr.json", "train/tokens/c/0/0"):
        assert folder.read(key) == LocalFolder(tiny_cache.paths.corpus).read(key)
    assert number == 4
    hub.misbehave = lambda method, path: 403 if method == "GET" else None
    with pytest.raises(DecantError, match="could not be downloaded, on attempt 1 "):
        folder.read("validation/zarr.json")
    hub.misbehave = lambda method, path: 401
    done = run_share(tmp_path / "params.yaml")
    assert done.exit_code == 1
    assert f"error: corpus and cache could not be pushed to {REPO} (" in done.output
    assert "the token that `hf auth login` or HF_TOKEN gives, and push again" in done.output


def test_a_push_that_was_killed_is_completed(
    hub: Hub, tiny_cache: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push_dataset, "_FILES_PER_COMMIT", 20)
    params = tmp_path / "params.yaml"
    child = multiprocessing.get_context("fork").Process(target=run_share, args=(params,))
    commits = 0

    def kill(method: str, path: str) -> int | None:
        nonlocal commits
        commits += "/commit/" in path
        if commits == 3 and child.pid:
            os.kill(child.pid, signal.SIGKILL)
            return 503
        return None

    hub.misbehave = kill
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    hub.misbehave = lambda method, path: None
    there = from_hub(tiny_cache)
    assert 0 < len(hub.files) <= 40
    message = f"{ADDRESS}/corpus.zarr holds no complete train split: name a repository"
    with pytest.raises(DecantError, match=message):
        CorpusSplit(there.paths.corpus, "train")
    already = len(hub.files)
    done = run_share(params)
    assert done.exit_code == 0, done.output
    [(new, of)] = re.findall(r"(\d+) of (\d+) files were new", done.output)
    assert int(of) - int(new) == already
    hub_folder._snapshot.cache_clear()
    for split in SPLITS:
        of_split = CorpusSplit(there.paths.corpus, split)
        assert not check_cache(there.paths.logits, of_split).damages
        assert CacheReader(there.paths.logits, of_split)


def test_a_second_push_leaves_the_first_to_those_who_pin_it(
    hub: Hub, tiny_cache: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pushed(tmp_path)
    assert pushed(tmp_path) == first  # nothing has changed
    assert len(hub.repos[REPO].commits) == 2
    open_folder(tiny_cache.paths.logits).remove()
    few = change(tiny_cache, prepare={"k": 8, "num_sampled": 0, "shard_rows": 32})
    capture_all(few)
    monkeypatch.setattr(push_dataset, "_FILES_PER_COMMIT", 20)
    second = pushed(tmp_path)
    kept = {}
    for revision in (f"@{first}", f"@{second}", "", "@main"):
        paths = from_hub(tiny_cache, revision).paths
        reader = CacheReader(paths.logits, CorpusSplit(paths.corpus, "train"))
        assert reader.num_bytes()
        kept[revision] = reader.fingerprint.k
    assert list(kept.values()) == [16, 8, 8, 8]
    store = LocalFolder(tiny_cache.paths.logits)
    sent = {path for path in hub.files if path.startswith("logits.zarr/")}
    assert sent == {f"logits.zarr/{key}" for key in store.sizes()}  # nothing of the first is left
    *_, old = commits_up_to(hub, first)
    between = list(hub.repos[REPO].commits.values())[len(commits_up_to(hub, first)) : -1]
    assert len(between) > 1
    assert all(path in old for path in GROUPS)
    assert not any(path in files for files in between for path in GROUPS)
    gone = change(tiny_cache, paths={"corpus": f"{ADDRESS}@no-such-branch"})
    with pytest.raises(DecantError, match="revision no-such-branch of the dataset repository"):
        CorpusSplit(gone.paths.corpus, "train")


def commits_up_to(hub: Hub, commit: str) -> list[dict[str, bytes]]:
    commits = hub.repos[REPO].commits
    return list(commits.values())[: list(commits).index(commit) + 1]


def test_what_is_not_whole_is_not_published(hub: Hub, tiny_cache: Params, tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    for path, message in (
        ("logits.zarr/train/lse/c/3/0", "has 1 damaged parts, the first is shard 3: lse/c/3/0"),
        ("logits.zarr/train/lse/zarr.json", "lse/zarr.json does not match its crc32c"),
        ("corpus.zarr/validation/digests/c/0/0", "shard 0 of .*corpus.zarr/validation is damaged"),
        ("corpus.zarr/train/tokens/zarr.json", r"tokens/zarr\.json does not match its crc32c"),
    ):
        file = tiny_cache.paths.logits.parent / path
        data = file.read_bytes()
        file.write_bytes(data[:-1] + b"!")
        done = run_share(params)
        assert done.exit_code == 1
        assert re.search(f"error: .*{message}", done.output), done.output
        file.write_bytes(data)
    (tiny_cache.paths.logits / "validation" / "commits" / "000000.json").unlink()
    done = run_share(params)
    assert done.exit_code == 1
    assert "is not captured: run stages/prepare.py" in done.output
    assert not hub.requests


def test_the_card(hub: Hub, tiny_cache: Params, tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    (tiny_cache.paths.logits / "train" / "notes.txt").write_text("mine")
    (tiny_cache.paths.corpus / "source.json").write_text(json.dumps({"text": str(tmp_path)}))
    done = run_share(params, "--dry-run")
    assert done.exit_code == 0, done.output
    assert not hub.requests
    for said in (
        "the card states no licence: name it by --license",
        "the card has no numbers of the gate: run stages/verify.py first",
        f"these would go to {REPO}, private if new; nothing was sent",
        "Not measured",
        "Not stated",
    ):
        assert said in done.output
    assert "warning" not in done.output
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(push_dataset, "MANY_ENTRIES", 2)
        warned = run_share(params, "--dry-run").output
    assert "the hub advises at most 100,000 and 2: capture with a larger" in warned
    gate = CliRunner().invoke(verify.main, ["--params", str(params)])
    assert gate.exit_code == 0, gate.output
    assert run_share(params, "--license", "cc-by-4.0", "--public").exit_code == 0
    assert hub.repositories[REPO]["visibility"] == "public"
    card = hub.files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "cc-by-4.0"
    assert front["viewer"] is False
    assert front["size_categories"] == ["n<1K"]
    reader = CacheReader(tiny_cache.paths.logits, CorpusSplit(tiny_cache.paths.corpus, "train"))
    for fact in (
        reader.fingerprint.teacher_sha256,
        reader.fingerprint.corpus_sha256,
        reader.fingerprint.tokenizer_sha256,
        "| kept of each position | the top 16 |",
        "| temperatures | 1, 2, 4 |",
        "the gate passed",
        "negative control",
        f"corpus: {ADDRESS}\n",
        f"hf download {ADDRESS}/tokenizer/ --local-dir shared",
    ):
        assert fact in card
    found: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0], found)  # reads it from the stand-in
    assert found["batch"]["input_ids"].shape == (8, 32)
    assert found["batch"]["teacher_ids"].shape == (8, 32, 16)
    assert not any(str(tmp_path).encode() in data for data in hub.files.values())
    assert "tokenizer/tokenizer.json" in hub.files
    assert "logits.zarr/train/notes.txt" not in hub.files
    assert "corpus.zarr/source.json" not in hub.files
    metrics = tiny_cache.paths.verify / "metrics.json"
    measured = json.loads(metrics.read_text())
    measured["cache_sha256"]["train"] = "0" * 64  # of a cache that was here before
    metrics.write_text(json.dumps(measured))
    assert "Not measured" in run_share(params, "--dry-run").output


def test_another_teacher_is_not_named_as_the_caches(
    tiny_cache: Params, tmp_path: Path, llama_folder: Path
) -> None:
    teacher = tmp_path / "other"
    teacher.mkdir()
    for file in llama_folder.iterdir():
        if "tokenizer" not in file.name:
            (teacher / file.name).write_bytes(file.read_bytes())
    done = run_share(tmp_path / "params.yaml", "--set", f"paths.teacher={teacher}")
    assert done.exit_code == 1
    assert "was captured from teacher" in done.output


def test_requests_that_are_refused(tiny_params: Params, tmp_path: Path) -> None:
    params = ["--params", str(tmp_path / "params.yaml")]
    done = CliRunner().invoke(share.main, params)
    assert done.exit_code == 2
    assert "error: share publishes to a dataset repository: name it by --push" in done.output
    done = CliRunner().invoke(share.main, [*params, "--push", "no-slash"])
    assert done.exit_code == 2
    assert "is no name on the hub" in done.output


@pytest.mark.parametrize(("stage", "key"), [(corpus, "corpus"), (prepare, "logits")])
def test_the_hub_is_only_read(stage: object, key: str, tiny_params: Params, tmp_path: Path) -> None:
    words = ["--params", str(tmp_path / "params.yaml"), "--set", f"paths.{key}={ADDRESS}@v1"]
    done = CliRunner().invoke(stage.main, words)  # type: ignore[attr-defined]
    assert done.exit_code == 2, done.output
    where = f"{ADDRESS}@v1/{key}.zarr"
    assert f"error: paths.{key}={where} is on the hub and only read: name a folder" in done.output


def test_a_folder_of_the_hub(hub: Hub, tiny_cache: Params, tmp_path: Path) -> None:
    pushed(tmp_path)
    folder = open_folder(HubUrl(f"{ADDRESS}/logits.zarr"))
    assert folder.sizes() == LocalFolder(tiny_cache.paths.logits).sizes()
    assert set(folder.sizes("train/commits")) == {
        key for key in folder.sizes() if key.startswith("train/commits/")
    }
    assert folder.sizes("nothing") == {}
    hub.requests.clear()
    with pytest.raises(FileNotFoundError):
        folder.read("train/nothing")
    assert not hub.requests
    for attempt in (
        lambda: folder.write("a", b""),
        lambda: folder.create("a", b""),
        lambda: folder.remove("train"),
    ):
        with pytest.raises(ParamsError, match="is on the hub and only read"):
            attempt()
    with pytest.raises(DecantError, match="revision main of the dataset repository o/n could not"):
        open_folder(HubUrl("hf://datasets/o/n"))


def test_addresses_on_the_hub(tmp_path: Path) -> None:
    url = parse_address(f"{ADDRESS}@refs%2Fpr%2F1/a/b/")
    assert isinstance(url, HubUrl)
    assert url.parts == (REPO, "refs/pr/1", "a/b")
    assert (url / "c").parts == (REPO, "refs/pr/1", "a/b/c")
    assert HubUrl(ADDRESS).parts == (REPO, "main", "")
    for text in ("hf://org/model", "hf://datasets/alone", "hf://datasets/o/n@", "hf://"):
        with pytest.raises(ValueError, match="write hf://datasets/ORG/NAME@REVISION"):
            parse_address(text)
    (tmp_path / "short.yaml").write_text("{}")
    edits = [f"paths.corpus={ADDRESS}@v1.0", f"paths.logits={ADDRESS}/elsewhere"]
    paths = load_params(tmp_path / "short.yaml", edits).paths
    assert paths.corpus == HubUrl(f"{ADDRESS}@v1.0/corpus.zarr")
    assert paths.logits == HubUrl(f"{ADDRESS}/elsewhere")
    with pytest.raises(ParamsError, match=r"paths\.checkpoints=.* is refused: the hub is only"):
        load_params(tmp_path / "short.yaml", [f"paths.checkpoints={ADDRESS}"])


STAGES = {"verify": verify, "share": share, "train": train}


def test_the_commands_of_the_page(
    hub: Hub, tiny_cache: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of docs/sharing.md, in order, in a folder with a small params.yaml."""
    small = change(tiny_cache, student=SMALL | {"vocab_size": "auto"})
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(small.model_dump(mode="json")))
    page = (ROOT / "docs" / "sharing.md").read_text()
    files, size = push_dataset._FILES_PER_COMMIT, push_dataset._BYTES_PER_COMMIT // 2**20
    assert f"beyond {files} files or {size} MiB" in page
    blocks = re.findall(r"^ {4}((?:.*\\\n)*.*)$", page, re.MULTILINE)
    commands = [shlex.split(line.replace("\\\n", " ").replace("ORG/NAME", REPO)) for line in blocks]
    assert len(commands) <= 15
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_CACHE": constants.HF_HUB_CACHE}
    words: list[str] = []
    ran = Counter[str]()
    for command in commands:
        command = [word for one in command for word in (words if one == "$@" else [one])]
        offline = command[0] == "HF_HUB_OFFLINE=1"
        command = command[offline:]
        ran[command[0]] += 1
        if command[:2] == ["set", "--"]:
            words = command[2:]
        elif command[:3] == ["hf", "auth", "login"]:
            continue
        elif command[0] == "hf":
            program = Path(sys.executable).with_name("hf")
            subprocess.run([program, *command[1:]], env=environment, check=True)
        else:
            stage = STAGES[Path(command[1]).stem]
            hub_folder._snapshot.cache_clear()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(constants, "HF_HUB_OFFLINE", offline)
                done = CliRunner().invoke(stage.main, command[2:], catch_exceptions=False)
            assert done.exit_code == 0, done.output
    assert ran == {"hf": 3, "python": 5, "set": 1}
    model = tiny_cache.paths.runs / "shared" / "model"
    tokenizer = tiny_cache.paths.teacher / "tokenizer.json"
    assert (model / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
