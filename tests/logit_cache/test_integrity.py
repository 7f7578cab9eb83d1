"""Fault injection: every kind of damage is found, named, and repaired by what is damaged alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from pipeline.config.params import Params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.errors import DecantError, MismatchError
from pipeline.io.checked_json import add_checksum
from pipeline.io.folders import LocalFolder
from pipeline.io.zarr_shards import encode_shard
from pipeline.logit_cache.codec import IdOrder
from pipeline.logit_cache.format import marker_key
from pipeline.logit_cache.integrity import CheckResult, check_cache
from pipeline.logit_cache.layout import id_order_name
from tests.helpers import capture_all, change, make_capture, open_cache, rewrite_checksums
from tests.models import make_teacher

CASES = 25  # of each kind below


def check(params: Params, split: str = "train") -> CheckResult:
    return check_cache(params.paths.logits, CorpusSplit(params.paths.corpus, split))


def all_arrays(params: Params) -> dict[str, np.ndarray]:
    group = zarr.open_group(params.paths.logits, path="train", mode="r")
    return {name: np.asarray(array[:]) for name, array in group.arrays()}


@pytest.fixture(scope="module")
def pristine(
    teacher_folder: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Params:
    """A cache of 24 shards with kept ids and sampled ids, shared by all cases of this file."""
    import yaml

    from pipeline.config.params import load_params
    from pipeline.data.corpus import build_corpus
    from tests.conftest import tiny_values

    folder = tmp_path_factory.mktemp("pristine")
    values = tiny_values(teacher_folder, text_folder, folder / "cache")
    values["paths"]["teacher"] = str(teacher_folder)
    values["prepare"] |= {"shard_rows": 4, "k": 8, "num_sampled": 4}
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    params = load_params(folder / "params.yaml")
    build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    capture_all(params)
    return params


@pytest.fixture
def cache(pristine: Params, tmp_path: Path) -> Params:
    """A copy of it to be damaged."""
    moved = {name: str(tmp_path / f"{name}.zarr") for name in ("corpus", "logits")}
    for name, path in moved.items():
        shutil.copytree(getattr(pristine.paths, name), path)
    return change(pristine, paths=moved)


def test_a_whole_cache_is_whole(pristine: Params) -> None:
    result = check(pristine)
    assert result.damages == ()
    assert (result.shards, result.committed, result.missing) == (24, 24, 0)


def shard_objects(params: Params) -> list[Path]:
    """Every object that belongs to one shard: the arrays' and the markers."""
    folder = params.paths.logits / "train"
    found = [*folder.glob("*/c/**/*"), *folder.glob("commits/*.json")]
    return sorted(f for f in found if f.is_file() and not f.match("id_order_*/c/0"))


def shard_number(file: Path) -> int:
    if file.suffix == ".json":
        return int(file.stem)
    parts = file.parts
    return int(parts[parts.index("c", parts.index("train")) + 1])


def flip_a_bit(file: Path, generator: np.random.Generator) -> None:
    content = bytearray(file.read_bytes())
    content[int(generator.integers(len(content)))] ^= 1 << int(generator.integers(8))
    file.write_bytes(content)


def truncate(file: Path, generator: np.random.Generator) -> None:
    file.write_bytes(file.read_bytes()[: int(generator.integers(1, file.stat().st_size))])


def lengthen(file: Path, generator: np.random.Generator) -> None:
    file.write_bytes(file.read_bytes() + generator.bytes(int(generator.integers(1, 50))))


def empty(file: Path, generator: np.random.Generator) -> None:
    file.write_bytes(b"")


def delete(file: Path, generator: np.random.Generator) -> None:
    file.unlink()


def fill_with_zeros(file: Path, generator: np.random.Generator) -> None:
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, lengthen, empty, delete, fill_with_zeros])
def test_damaged_objects_are_named(
    damage: Callable[[Path, np.random.Generator], None], cache: Params
) -> None:
    """One object at a time, of any array or a marker; each is put back before the next."""
    generator = np.random.default_rng(0)
    objects = shard_objects(cache)
    for place in generator.permutation(len(objects))[:CASES]:
        file = objects[place]
        content = file.read_bytes()
        damage(file, generator)
        result = check(cache)
        if damage is delete and file.suffix == ".json":
            assert (result.damages, result.missing) == ((), 1)
        else:
            assert [found.shard for found in result.damages] == [shard_number(file)], file
        file.write_bytes(content)
    assert check(cache).damages == ()


def same_json(one: bytes, two: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(two))
    except ValueError:
        return False


def test_a_bit_anywhere_in_the_metadata_is_found(cache: Params) -> None:
    generator = np.random.default_rng(1)
    for file in sorted((cache.paths.logits / "train").glob("**/zarr.json")):
        content = file.read_bytes()
        for _ in range(CASES):
            flip_a_bit(file, generator)
            with suppress(MismatchError):  # another format, another corpus, or not ours at all
                found = check(cache).damages
                # A bit in the blanks between words leaves the same JSON: the group reads the same.
                harmless = file.parent.name == "train" and same_json(file.read_bytes(), content)
                assert found or harmless, file
            file.write_bytes(content)


def swap(one: Path, two: Path) -> None:
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def test_swapped_shards_are_found(cache: Params) -> None:
    """Objects of two shards exchanged: those of one array or of all, without or with markers."""
    folder = LocalFolder(cache.paths.logits / "train")
    specs = open_cache(cache).layout.specs
    generator = np.random.default_rng(2)

    def keys(name: str, i: int, j: int) -> list[Path]:
        return [cache.paths.logits / "train" / specs[name].key_of(shard) for shard in (i, j)]

    for case in range(CASES):
        i, j = sorted(int(n) for n in generator.choice(24, 2, replace=False))
        names = [str(generator.choice(list(specs)))] if case % 2 else list(specs)
        with_markers = case % 4 >= 2
        for found in ([i, j], []):  # there, and back again
            for name in names:
                swap(*keys(name, i, j))
            if with_markers:
                swap(*(cache.paths.logits / "train" / marker_key(shard) for shard in (i, j)))
            assert [damage.shard for damage in check(cache).damages] == found

    # A clever one, that also makes the markers fit: only the tokens tell.
    for name in specs:
        swap(*keys(name, 0, 1))
    markers = [json.loads(folder.read(marker_key(shard))) for shard in (0, 1)]
    for shard, marker in enumerate(markers):
        fitted = {**marker, "shard": 1 - shard, "rows": markers[1 - shard]["rows"]}
        del fitted["crc32c"]
        folder.write(marker_key(1 - shard), json.dumps(add_checksum(fitted)).encode())
    result = check(cache)
    assert [damage.shard for damage in result.damages] == [0, 1]
    assert "captured from other tokens than rows 0..4" in result.damages[0].what


def test_tokens_changed_under_the_cache_are_found(cache: Params) -> None:
    corpus = CorpusSplit(cache.paths.corpus, "train")
    spec = corpus._specs["tokens"]
    folder = LocalFolder(cache.paths.corpus / "train")
    generator = np.random.default_rng(3)
    whole = corpus.rows(0, len(corpus)).tokens
    for _ in range(CASES):
        row, place = int(generator.integers(len(whole))), int(generator.integers(32))
        changed = whole.copy()
        changed[row, place] = (changed[row, place] + 1) % 300
        folder.write(spec.key_of(0), encode_shard(spec, changed))
        with pytest.raises(DecantError, match=r"shard 0 of .*: run stages/corpus\.py --overwrite"):
            check(cache)
        rewrite_checksums(cache.paths.corpus / "train")
        result = check(cache)
        assert [damage.shard for damage in result.damages] == [row // 4]
        with pytest.raises(MismatchError, match=f"shard {row // 4} .* other tokens .*--repair"):
            open_cache(cache).shard(row // 4)
    folder.write(spec.key_of(0), encode_shard(spec, whole))
    rewrite_checksums(cache.paths.corpus / "train")
    assert check(cache).damages == ()


def test_the_reader_refuses_what_the_check_finds(cache: Params) -> None:
    generator = np.random.default_rng(4)
    objects = shard_objects(cache)
    for place in generator.permutation(len(objects))[:CASES]:
        file = objects[place]
        content = file.read_bytes()
        flip_a_bit(file, generator)
        reader = open_cache(cache)
        with pytest.raises(MismatchError, match=r"is damaged .*--repair"):
            reader.shard(shard_number(file))
        file.write_bytes(content)


@pytest.mark.parametrize("seed", range(3))
def test_repair_recaptures_just_the_damaged(seed: int, cache: Params) -> None:
    before = all_arrays(cache)
    generator = np.random.default_rng(seed)
    objects = shard_objects(cache)
    kinds = [flip_a_bit, truncate, empty, delete]
    damaged = set()
    for place in generator.permutation(len(objects))[:5]:
        kinds[int(generator.integers(4))](objects[place], generator)
        damaged.add(shard_number(objects[place]))
    untouched = {
        file: file.stat().st_mtime_ns
        for file in shard_objects(cache)
        if shard_number(file) not in damaged
    }
    results = capture_all(cache, repair=True)
    assert results[0].shards_done == len(damaged)
    assert check(cache).damages == ()
    after = all_arrays(cache)
    for name, values in before.items():
        assert np.array_equal(values, after[name]), name
    assert all(file.stat().st_mtime_ns == time for file, time in untouched.items())


def say_another_k(file: Path, generator: np.random.Generator) -> None:
    file.write_bytes(file.read_bytes().replace(b'"k": 8', b'"k": 9'))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("zarr.json", say_another_k),
        ("zarr.json", truncate),
        ("id_indices/zarr.json", flip_a_bit),
        ("lse/zarr.json", truncate),
        ("logprob_deltas/zarr.json", delete),
        ("table", flip_a_bit),
        ("table", empty),
        ("table", delete),
    ],
)
def test_repair_of_metadata_keeps_the_shards(
    name: str, damage: Callable[[Path, np.random.Generator], None], cache: Params
) -> None:
    before = all_arrays(cache)
    folder = cache.paths.logits / "train"
    file = next(folder.glob("id_order_*/c/0")) if name == "table" else folder / name
    damage(file, np.random.default_rng(5))
    assert check(cache).damages
    if name in ("table", "zarr.json"):  # the others are for foreign readers
        with pytest.raises(MismatchError, match=r"is damaged .*--repair"):
            open_cache(cache)
    results = capture_all(cache, repair=True)
    assert [result.shards_done for result in results] == [0, 0]
    assert check(cache).damages == ()
    after = all_arrays(cache)
    for array, values in before.items():
        assert np.array_equal(values, after[array])


def test_a_group_that_is_gone_is_begun_again_over_its_shards(cache: Params) -> None:
    (cache.paths.logits / "train" / "zarr.json").unlink()
    with pytest.raises(MismatchError, match=r"does not exist: run stages/prepare\.py"):
        open_cache(cache)
    assert capture_all(cache)[0].shards_done == 0
    assert check(cache).damages == ()


def test_shards_of_a_cache_that_was_here_before_do_not_count(cache: Params, tmp_path: Path) -> None:
    """The group deleted, its shards left: they are another teacher's, in the same shapes."""
    (cache.paths.logits / "train" / "zarr.json").unlink()
    make_teacher(tmp_path / "other", seed=1)
    other = change(cache, paths={"teacher": str(tmp_path / "other")})
    capture = make_capture(other, "train")
    result = check(other)
    assert len(result.damages) == 24
    assert "captured for another cache" in result.damages[0].what
    with pytest.raises(MismatchError, match="captured for another cache"):
        open_cache(other).shard(0)
    assert capture.writer.missing() == list(range(24))
    assert capture.run(capture.writer.missing()).shards_missing == 0
    assert check(other).damages == ()


def test_a_marker_that_is_damaged_is_no_commit(cache: Params) -> None:
    """Without --repair as well: the shard is captured again rather than left for dead."""
    flip_a_bit(cache.paths.logits / "train" / marker_key(7), np.random.default_rng(6))
    assert make_capture(cache, "train").writer.missing() == [7]
    assert capture_all(cache)[0].shards_done == 1
    assert check(cache).damages == ()


@pytest.mark.parametrize("seed", range(4))
def test_repair_finds_the_rank_table_of_the_cache_among_others(seed: int, cache: Params) -> None:
    """Processes that create a cache at once leave a table each."""
    folder = LocalFolder(cache.paths.logits / "train")
    layout = open_cache(cache).layout
    other = IdOrder(np.random.default_rng(seed).permutation(300))
    spec = replace(layout.id_order_spec, name=id_order_name(other))
    folder.write(spec.key_of(0), encode_shard(spec, other.ids))
    truncate(cache.paths.logits / "train" / "zarr.json", np.random.default_rng(5))
    assert capture_all(cache, repair=True)[0].shards_done == 0
    assert check(cache).damages == ()
    assert open_cache(cache).layout == layout


def test_repair_refuses_a_cache_of_another_teacher(cache: Params, tmp_path: Path) -> None:
    make_teacher(tmp_path / "other", seed=1)
    other = change(cache, paths={"teacher": str(tmp_path / "other")})
    with pytest.raises(MismatchError, match="was made with teacher_sha256="):
        capture_all(other, repair=True)
