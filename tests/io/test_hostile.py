"""Damaged and malicious files: refused in one sentence, in little time and memory."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from pipeline.config.params import Params, load_params
from pipeline.config.params_file import load_yaml
from pipeline.data.corpus_zarr import OBJECTS, CorpusSplit, objects_key
from pipeline.errors import DecantError, ParamsError
from pipeline.io.checked_json import DamagedError, add_checksum, crc32c
from pipeline.io.folders import LocalFolder
from pipeline.io.zarr_shards import _BLOSC, decode_shard, entry_of
from pipeline.logit_cache.format import marker_key
from pipeline.logit_cache.integrity import check_cache
from pipeline.logit_cache.reader import CacheReader
from pipeline.training.checkpoint import Checkpoints, TrainState, _sum
from pipeline.training.dist_checkpoint import Learner
from tests.helpers import ROOT

MUTATIONS = 200
SECONDS = 10.0  # for one of them, on a busy machine
MEGABYTES = 300


@contextmanager
def bounded() -> Iterator[None]:
    """Neither long nor large."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert time.monotonic() - started < SECONDS
    assert after - before < MEGABYTES * 1024


def refusal(work: Callable[[], object]) -> str:
    """What is said of it, empty if it is taken; a traceback fails the test."""
    try:
        work()
    except DecantError as error:
        return str(error)
    return ""


NAMES = zip("abcdef", "bcdefg", strict=True)
NINE = [f",&{name} [{','.join([f'*{before}'] * 9)}]" for before, name in NAMES]
BOMB = f"[&a [x,x,x,x,x,x,x,x,x]{''.join(NINE)}]"
VALUES = [
    BOMB,
    "&s [*s]",
    "1" * 5000,
    "0x" + "f" * 5000,
    "[" * 300,
    "[" * 300 + "]" * 300,
    "x" * 5000,
    ".nan",
    "-.inf",
    "1e999",
    "2001-99-99",
    "!!python/object/apply:os.system ['false']",
    "!!int x",
    "!!int ''",
    "!!bool x",
    "!!null x",
    "!!seq x",
    "!!map [x]",
    "!!set [x]",
    "!!omap x",
    "!!pairs x",
    "!!binary '%'",
    "!!timestamp x",
    "{a: 1, a: 2}",
    "? [1]\n  : 2",
    "<<: 1",
    "\x1b[2J",
    "\u202e",
    "\x00",
    "null",
    "true",
    "{}",
    "[]",
    "- 1",
    "*nowhere",
    "'",
]


def mutate_text(text: str, generator: random.Random) -> str:
    lines = text.splitlines()
    place = generator.randrange(len(lines))
    key = lines[place].partition(":")[0]
    kind = generator.randrange(6)
    if kind <= 2:
        lines[place] = f"{key}: {generator.choice(VALUES)}"
    elif kind == 3:
        lines.insert(generator.randrange(len(lines)), lines[place])
    elif kind == 4:
        del lines[place : place + generator.randrange(1, 4)]
    else:
        cut = generator.randrange(len(lines[place]) + 1)
        lines[place] = lines[place][:cut] + generator.choice("[]{}:&*!|>'\"%@`,?-#\t\x00") + "\n"
    return "\n".join(lines)


def test_params_files_changed_at_random(tmp_path: Path) -> None:
    text = yaml.safe_dump(yaml.safe_load((ROOT / "params.yaml").read_text()))
    generator, refused = random.Random(0), 0
    file = tmp_path / "params.yaml"
    for _ in range(MUTATIONS):
        file.write_text(mutate_text(text, generator))
        with bounded():
            said = refusal(lambda: load_params(file))
        refused += bool(said)
        assert "\n" not in said
        assert len(said) < 600
    assert refused > MUTATIONS / 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is there already, on line 1"),
        ("a: {b: 1, b: 2}", "line 1: the key 'b' is there already, on line 1"),
        (BOMB, "its anchors expand to .* values, the limit is 20,000"),
        ("&a [*a]", "an anchor holds itself"),
        ("a: " + "1" * 5000, "line 1: a number of 5,000 digits"),
        ("a: 0x" + "f" * 5000, "line 1: a number of 5,002 digits"),
        ("a: 2001-99-99", "line 1: '2001-99-99' is no timestamp"),
        ("[" * 1500, "nested too deeply"),
        ("a: [", "line 1: .*expected the node content"),
    ],
)
def test_what_yaml_hides_is_refused_by_line(text: str, message: str) -> None:
    with bounded(), pytest.raises(ValueError, match=message):
        load_yaml(text)


def test_aliases_and_merges_of_ordinary_size_stay() -> None:
    text = (
        "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\nd: {e: &e {<<: *a, x: 5}, f: {<<: *e}}"
    )
    assert load_yaml(text) == yaml.safe_load(text)


def test_overrides_of_absurd_size(tmp_path: Path) -> None:
    file = ROOT / "params.yaml"
    for value in ("1" * 5000, "9" * 200, "[" * 300, "[1," * 5000, "float(" + "9" * 400 + ")"):
        with bounded(), pytest.raises(ParamsError) as caught:
            load_params(file, [f"seed={value}"])
        assert len(str(caught.value)) < 600
    with pytest.raises(ParamsError, match="has more than 1,048,576 bytes"):
        load_params(Path("/dev/zero"))


HOSTILE: list[Any] = [
    None, True, "", "x" * 1000, "1", -1, 0, 1, 1.5, 10**9, 2**40, 2**63, 10**30, float("nan"),
    [], [1], [[[[1]]]], {}, {"a": 1}, "../../x", "\ud800",
]  # fmt: skip


def mutate(values: Any, generator: random.Random) -> Any:
    """A value anywhere in some JSON made another, removed, or doubled."""
    changed = copy.deepcopy(values)
    node = changed
    while True:
        key = generator.choice(list(node) if isinstance(node, dict) else range(len(node)))
        inner = node[key]
        if not (isinstance(inner, dict | list) and inner) or generator.random() < 0.15:
            break
        node = inner
    kind = generator.randrange(8)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node["unknown"] = node.pop(key)
    else:
        node[key] = generator.choice(HOSTILE)
    return changed


def survive(work: Callable[[], object]) -> bool:
    """Whether it is refused; a traceback fails the test."""
    with bounded():
        said = refusal(work)
    assert len(said) < 1500
    return bool(said)


def test_metadata_of_a_corpus_with_valid_checksums(tiny_corpus: Params) -> None:
    place = Path(str(tiny_corpus.paths.corpus))
    file = place / "train" / "zarr.json"
    [objects] = (place / "train" / "objects").iterdir()
    whole, listed = json.loads(file.read_text()), objects.read_text()

    def write(about: Any) -> None:
        attributes = {"decant": about, "arrays": whole["attributes"]["arrays"]}
        file.write_text(json.dumps(whole | {"attributes": add_checksum(attributes)}))

    def read() -> None:
        split = CorpusSplit(place, "train")
        split.rows(0, len(split))

    generator, refused = random.Random(1), 0
    for _ in range(100):
        write(mutate(whole["attributes"]["decant"], generator))
        refused += survive(read)
    for _ in range(60):
        text = json.dumps(mutate(json.loads(listed), generator)).encode()
        entry = entry_of(OBJECTS, text)
        (place / "train" / objects_key(entry)).write_bytes(text)
        write(whole["attributes"]["decant"] | {"objects": entry})
        refused += survive(read)
    assert refused > 140
    for _ in range(40):
        file.write_text(json.dumps(mutate(whole, generator)))
        survive(read)


def test_metadata_of_a_cache_with_valid_checksums(tiny_cache: Params) -> None:
    corpus = CorpusSplit(tiny_cache.paths.corpus, "train")
    place = Path(str(tiny_cache.paths.logits))
    file, marker = place / "train" / "zarr.json", place / "train" / marker_key(0)
    whole, said = json.loads(file.read_text()), json.loads(marker.read_text())
    del said["crc32c"]

    def read() -> None:
        reader = CacheReader(place, corpus)
        reader.num_bytes()
        reader.top_k(np.array([0, 17]))

    def check() -> None:
        check_cache(place, corpus)

    generator, refused = random.Random(2), 0
    for number in range(120):
        about = mutate(whole["attributes"]["decant"], generator)
        attributes = {"decant": about, "arrays": whole["attributes"]["arrays"]}
        if number % 4 == 0:
            attributes = mutate(attributes, generator)
        file.write_text(json.dumps(whole | {"attributes": add_checksum(attributes)}))
        refused += survive(read)
        if number % 4 == 0:
            survive(check)
    file.write_text(json.dumps(whole))
    for number in range(80):
        marker.write_text(json.dumps(add_checksum(mutate(said, generator))))
        refused += survive(read)
        if number % 4 == 0:
            survive(check)
    assert refused > 180


def test_a_shard_that_decodes_to_gigabytes_is_refused(tiny_cache: Params) -> None:
    """Zeros compress well; length and hash are those that the marker says."""
    reader = CacheReader(tiny_cache.paths.logits, CorpusSplit(tiny_cache.paths.corpus, "train"))
    spec = reader.layout.specs["lse"]
    data = bytes(_BLOSC.encode(np.zeros(2**26, np.uint8)))
    header = bytearray(data[:16])
    header[4:8] = (2**31 - 16).to_bytes(4, "little")
    for blob in (data, bytes(header) + data[16:], data[:7]):
        chunk = blob + crc32c(blob).to_bytes(4, "little")
        index = np.zeros((spec.shard_rows // spec.chunk_rows, 2), "<u8")
        index[:, 1] = len(chunk)
        table = index.tobytes()
        shard = chunk + table + crc32c(table).to_bytes(4, "little")
        with bounded(), pytest.raises(DamagedError, match=r"says that it holds|outside"):
            decode_shard(spec, shard, 0)


def test_swapped_and_foreign_shards_of_a_corpus_are_refused(
    tiny_corpus: Params, tmp_path: Path
) -> None:
    folder = Path(str(tiny_corpus.paths.corpus)) / "train"
    store, split = LocalFolder(folder), CorpusSplit(tiny_corpus.paths.corpus, "train")
    key = split._specs["tokens"].key_of(0)
    other = store.read(split._specs["doc_ids"].key_of(0))
    tokens = store.read(key)
    for data in (other, tokens[:-1], b""):
        store.write(key, data)
        with pytest.raises(
            DecantError, match=r"shard 0 .* damaged .*run stages/corpus\.py --overwrite"
        ):
            CorpusSplit(tiny_corpus.paths.corpus, "train").rows(0, 1)
    store.write(key, tokens)
    objects = objects_key(split.info.objects)
    store.remove(objects)
    with pytest.raises(DecantError, match=r"objects/\w+\.json is missing"):
        CorpusSplit(tiny_corpus.paths.corpus, "train")
    store.write(objects, b"{}")
    with pytest.raises(DecantError, match=r"objects/\w+\.json does not match its hash"):
        CorpusSplit(tiny_corpus.paths.corpus, "train")


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    found = Checkpoints(tmp_path / "checkpoints")
    found.save(make_learner(), TrainState(3, 0, [{"step": 3.0, "loss": float("nan")}]))
    return found


def make_learner() -> Learner:
    module = nn.Linear(6, 5)
    return Learner(module, torch.optim.AdamW(module.parameters(), fused=True))


def test_metadata_of_a_checkpoint_that_fits_its_checksums(
    checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(str(checkpoints.address)) / "step_00000003"
    state, complete = folder / "state.json", folder / "complete.json"
    said, listed = json.loads(state.read_text()), json.loads(complete.read_text())
    found = checkpoints.load_newest(make_learner())
    assert found is not None
    assert np.isnan(found.history[0]["loss"])

    def read() -> None:
        checkpoints.load_newest(make_learner())

    generator, refused = random.Random(3), 0
    for _ in range(60):
        state.write_text(json.dumps(mutate(said, generator)))
        listed["files"]["state.json"] = _sum(state)
        complete.write_text(json.dumps(listed))
        refused += survive(read)
    state.write_text(json.dumps(said))
    listed["files"]["state.json"] = _sum(state)
    for _ in range(60):
        complete.write_text(json.dumps(mutate(listed, generator)))
        refused += survive(read)
    assert refused > 80
    assert "is damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["state.json", "__0_0.distcp", ".metadata", "complete.json", "new"]
)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_device_in_a_checkpoint_is_no_hang(
    name: str, kind: str, checkpoints: Checkpoints
) -> None:
    file = Path(str(checkpoints.address)) / "step_00000003" / name
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    with bounded(), pytest.raises(DecantError, match=r"none of the checkpoints .* is complete"):
        checkpoints.load_newest(make_learner())


def test_a_pipe_among_the_objects_of_a_corpus_is_no_hang(tiny_corpus: Params) -> None:
    folder = Path(str(tiny_corpus.paths.corpus)) / "train"
    file = folder / "tokens" / "c" / "0" / "0"
    file.unlink()
    os.mkfifo(file)
    with bounded(), pytest.raises(DecantError, match="is not a regular file but a pipe"):
        CorpusSplit(tiny_corpus.paths.corpus, "train").rows(0, 1)
    shutil.rmtree(folder)
