"""The cache's size and speed: bytes per token by array, reading, writing.

    python tests/benchmarks/cache_speed.py [--rounds 5] [--batches 200] [--set KEY=VALUE]

Reads and writes the cache at paths.logits, the demo's own after `dvc repro`, files in the page
cache, everything checked as in training.
Ratios are between variants that take turns in one run; tokens a second are this machine's.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from pipeline.config.params import Params, load_params
from pipeline.data.corpus_zarr import CorpusSplit, hash_rows
from pipeline.io.zarr_shards import ArraySpec, decode_shard, encode_shard
from pipeline.logit_cache.codec import encode, to_deltas
from pipeline.logit_cache.reader import CacheReader, read_marker
from pipeline.logit_cache.writer import CacheWriter, create_cache
from pipeline.target_sources.cached import CachedTargets
from pipeline.training.batches import BatchStream

THREADS = 2


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def medians(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each variant; they take turns, after one round of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, call in variants.items():
            spent = seconds(call)
            if turn:
                times[name].append(spent)
    return {name: statistics.median(values) for name, values in times.items()}


def print_sizes(reader: CacheReader) -> None:
    """Bytes per token of each array, of the corpus beside it, and of simpler ways to store it."""
    tokens = reader.fingerprint.num_rows * reader.fingerprint.row_length
    sizes: dict[str, int] = {}
    for shard in range(reader.layout.num_shards):
        for name, (size, _) in read_marker(reader._folder, shard).objects.items():
            sizes[name] = sizes.get(name, 0) + size
    cache = sum(sizes.values())
    group = reader.corpus._folder.sizes()
    for name in ("tokens", "doc_ids", "in_loss"):
        sizes[name] = sum(size for key, size in group.items() if key.startswith(f"{name}/c/"))
    for name, size in sizes.items():
        print(f"  {name:20} {size / tokens:7.2f} bytes per token")
    print(f"  {'all':20} {sum(sizes.values()) / tokens:7.2f} bytes per token")
    repeated = repeated_sizes(reader)
    print(
        "  the same values with as many entries at each position, samples repeated, float32 sums:"
    )
    for name, size in repeated.items():
        print(f"    {name:20} {size / tokens:7.2f} bytes per token")
    before, alone = sum(repeated.values()), size_at_one(reader)
    print(f"  the cache over that: {cache / before:.3f}")
    print(
        f"  with prepare.temperatures=[1.0] it takes {alone / tokens:.2f} bytes per token, "
        f"{alone / before:.3f} of that"
    )
    k = reader.fingerprint.k
    if k:
        print(f"  int32 ids + float16 log-probabilities, plain: {6 * k} bytes per token")
        print(f"  the same in parquet with zstd: {parquet_bytes(reader):.1f} bytes per token")


def size_at_one(reader: CacheReader) -> int:
    """Bytes of the whole cache without what temperatures other than 1 need."""
    made_from = replace(reader.fingerprint, temperatures=())
    layout = replace(reader.layout, fingerprint=made_from)
    size = 0
    for shard in range(layout.num_shards):
        topk = reader.top_k(np.arange(*layout.rows_of(shard)))
        topk = replace(topk, temperatures=(), lse_tau=topk.lse_tau[..., :0])
        arrays = encode(topk, reader.id_order, made_from, layout.chunk_rows)
        size += sum(len(encode_shard(spec, arrays[name])) for name, spec in layout.specs.items())
    return size


def repeated_sizes(reader: CacheReader) -> dict[str, int]:
    """Bytes of the whole cache by array, if no array were ragged.

    Each position then has K ids, and all its samples, sorted, each with its log-probability; the
    sums of temperatures, 1 included, and lse are float32, the entropy float16.
    """
    made_from, layout = reader.fingerprint, reader.layout
    sizes: dict[str, int] = {}
    for shard in range(layout.num_shards):
        start, stop = layout.rows_of(shard)
        topk = reader.top_k(np.arange(start, stop))
        index_of = reader.id_order.index_of
        ones = torch.zeros(*topk.lse.shape, 1)
        arrays = {
            "lse": topk.lse.float().numpy(),
            "lse_tau": torch.cat((ones, topk.lse_tau), -1).numpy(),
            "entropy": topk.entropy.half().numpy(),
        }
        if made_from.k:
            arrays["id_indices"] = index_of[topk.ids.numpy()]
            bits = to_deltas(topk.logprobs.half().numpy().view(np.uint16))
            arrays["logprob_deltas"] = np.moveaxis(bits, -1, 1)  # rank by rank
        if made_from.num_sampled:
            counts = topk.sampled_counts.flatten(0, 1)
            counts[:, 0] += made_from.num_sampled - counts.sum(-1)  # where there is no target
            place = torch.arange(counts.shape[-1]).expand(counts.shape)
            place = place.flatten().repeat_interleave(counts.flatten().long())
            place = place.view(*topk.lse.shape, made_from.num_sampled)
            indices = np.sort(index_of[topk.sampled_ids.gather(-1, place).numpy()], -1)
            arrays["sampled_index_deltas"] = to_deltas(indices)
            if topk.sampled_logprobs.shape[-1]:
                found = topk.sampled_logprobs.gather(-1, place)
                arrays["sampled_logprobs"] = found.half().numpy()
        for name, values in arrays.items():
            spec = ArraySpec(
                name=name,
                shape=values.shape,
                dtype=str(values.dtype),
                chunk_rows=layout.chunk_rows,
                shard_rows=layout.shard_rows,
            )
            sizes[name] = sizes.get(name, 0) + len(encode_shard(spec, values))
    return sizes


def parquet_bytes(reader: CacheReader) -> float:
    """Bytes per token of ids and log-probabilities alone, as lists in a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = np.arange(min(64, reader.fingerprint.num_rows))
    topk = reader.top_k(rows)
    k = topk.k
    columns = {
        "ids": pa.FixedSizeListArray.from_arrays(
            pa.array(topk.ids.numpy().astype(np.int32).ravel()), k
        ),
        "logprobs": pa.FixedSizeListArray.from_arrays(
            pa.array(topk.logprobs.numpy().astype(np.float16).ravel()), k
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sample.parquet"
        pq.write_table(pa.table(columns), file, compression="zstd")
        return file.stat().st_size / topk.lse.numel()


def print_reading(reader: CacheReader, params: Params, rounds: int, steps: int) -> None:
    """Whole shards, decoded and checked; shuffled batches as training gets them; zarr's own way."""
    tokens = reader.fingerprint.num_rows * reader.fingerprint.row_length
    shards = range(reader.layout.num_shards)
    group = zarr.open_group(params.paths.logits, path="train", mode="r")

    def by_threads(number: int) -> Callable[[], object]:
        def call() -> None:
            with ThreadPoolExecutor(number) as pool:
                list(pool.map(reader.shard, shards))

        return call

    def by_zarr() -> None:
        for name in reader.layout.specs:
            np.asarray(group[name][:])

    variants: dict[str, Callable[[], object]] = {
        "one thread": by_threads(1),
        "two threads": by_threads(THREADS),
        "zarr": by_zarr,
    }
    times = medians(variants, rounds)
    for name, spent in times.items():
        print(f"  shards, {name:12} {tokens / spent / 1e6:6.2f} M tokens/s")
    print(f"  ours on two threads against zarr: {times['zarr'] / times['two threads']:.2f}")
    length = reader.fingerprint.row_length
    rows = min(max(1, 8192 // length), reader.fingerprint.num_rows)
    stream = BatchStream(
        CachedTargets(reader),
        batch_rows=rows,
        window_shards=params.train.shuffle_shards,
        seed=0,
    )
    waits = []
    batches = stream.starting_at(0)
    next(batches)
    started = time.perf_counter()
    for _ in range(steps):
        begun = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - begun)
    whole = time.perf_counter() - started
    print(
        f"  shuffled batches of {rows * length:,} tokens: "
        f"{steps * rows * length / whole / 1e6:.2f} M tokens/s, median "
        f"{statistics.median(waits) * 1e3:.1f} ms, 90 % in {np.quantile(waits, 0.9) * 1e3:.1f} ms"
    )


def print_codecs(reader: CacheReader, rounds: int) -> None:
    """Encode and decode shard by shard in memory, with nothing else that reading and writing do.

    ZARR_CODEC_PIPELINE__PATH in the environment selects another of zarr's pipelines.
    """
    folder, specs = reader._folder, reader.layout.specs
    objects = {key: folder.read(key) for key in folder.sizes()}
    new = default_buffer_prototype().buffer.from_bytes
    group: Any = zarr.open_group(MemoryStore({k: new(v) for k, v in objects.items()}), mode="r+")
    values = {name: np.asarray(group[name][:]) for name in specs}
    shards = [
        (spec, shard, slice(*spec.rows_of(shard)))
        for spec in specs.values()
        for shard in range(spec.num_shards)
    ]

    def encode_by_zarr() -> None:
        for spec, _, rows in shards:
            group[spec.name][rows] = values[spec.name][rows]

    times = medians(
        {
            "decode": lambda: [decode_shard(a, objects[a.key_of(n)], n) for a, n, _ in shards],
            "decode by zarr": lambda: [group[spec.name][rows] for spec, _, rows in shards],
            "encode": lambda: [encode_shard(a, values[a.name][rows]) for a, _, rows in shards],
            "encode by zarr": encode_by_zarr,
        },
        rounds,
    )
    tokens = reader.fingerprint.num_rows * reader.fingerprint.row_length
    print(f"  zarr {zarr.__version__}, {zarr.config.get('codec_pipeline.path').rpartition('.')[2]}")
    for name, spent in times.items():
        print(f"  {name:16} {tokens / spent / 1e6:6.2f} M tokens/s")


def print_writing(reader: CacheReader, rounds: int) -> None:
    """Encode and write durably in background threads, as capture does."""
    corpus, layout = reader.corpus, reader.layout
    shards = [
        (shard, reader.top_k(np.arange(*layout.rows_of(shard))))
        for shard in range(layout.num_shards)
    ]
    hashes = [hash_rows(corpus.rows(*layout.rows_of(shard))) for shard, _ in shards]
    tokens = reader.fingerprint.num_rows * reader.fingerprint.row_length
    spent = []
    for _ in range(rounds):
        folder = Path(tempfile.mkdtemp())
        create_cache(
            folder,
            "train",
            reader.fingerprint,
            chunk_rows=layout.chunk_rows,
            shard_rows=layout.shard_rows,
            id_order=reader.id_order,
        )
        writer = CacheWriter(folder, "train", reader.fingerprint)

        def write() -> None:
            with ThreadPoolExecutor(THREADS) as pool:
                list(
                    pool.map(
                        lambda item: writer.write(item[0][0], item[0][1], item[1]),  # noqa: B023
                        zip(shards, hashes, strict=True),
                    )
                )

        spent.append(seconds(write))
        shutil.rmtree(folder)
    print(
        f"  {THREADS} threads: {tokens / statistics.median(spent) / 1e3:.0f} k tokens/s, "
        "compressed, synced, committed"
    )


def print_data_wait(params: Params) -> None:
    """What share of its steps the demo's training waited for data."""
    folder = params.paths.runs / "student" / "dvclive" / "plots" / "metrics" / "train"
    if not folder.exists():
        print("  no run was trained")
        return
    lines = (folder / "data_wait.tsv").read_text().splitlines()
    column = lines[0].split("\t").index("data_wait")
    waits = [float(line.split("\t")[column]) for line in lines[1:]]
    print(f"  share of a training step: median {statistics.median(waits):.3%}, mean over all but")
    print(f"  the first, which starts the threads, {statistics.mean(waits[1:]):.3%}")


@click.command()
@click.option("--rounds", default=5, help="Timed turns of each variant.")
@click.option("--batches", default=200, help="Shuffled batches that are read.")
@click.option("--set", "overrides", multiple=True, help="As the stages take it.")
def main(rounds: int, batches: int, overrides: tuple[str, ...]) -> None:
    """Print everything."""
    params = load_params(Path("params.yaml"), list(overrides))
    reader = CacheReader(params.paths.logits, CorpusSplit(params.paths.corpus, "train"))
    for title, call in itertools.chain(
        {
            "size": lambda: print_sizes(reader),
            "reading": lambda: print_reading(reader, params, rounds, batches),
            "codecs, one thread": lambda: print_codecs(reader, rounds),
            "writing": lambda: print_writing(reader, rounds),
            "waiting for data": lambda: print_data_wait(params),
        }.items()
    ):
        print(title)
        call()


if __name__ == "__main__":
    main()
