"""Capture and training hold a bounded number of shards, whatever the corpus: peak memory by size.

    python tests/benchmarks/cache_memory.py [--rows 2048]

Corpora of 1, 4 and 16 times as many rows, with a small random teacher, so that what is measured is
the data path. Each capture and each epoch of batches runs in a process of its own; printed is how
much memory each took at its peak beyond what it held before the first row, and its ratio to the
smallest corpus's. A corpus held in memory would show 4 and 16.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import yaml
from measure import forget_peak, in_child, peak_mib

from pipeline.capture.capture import fingerprint_of, open_capture
from pipeline.config.params import Params, load_params
from pipeline.data.corpus_writer import SplitWriter
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import Rows
from pipeline.logit_cache.reader import CacheReader
from pipeline.model.folder import hash_tokenizer
from pipeline.runtime.device import DTYPES, pick_device
from pipeline.target_sources.cached import CachedTargets
from pipeline.teacher.transformers import HuggingFaceTeacher
from pipeline.training.batches import BatchStream

SCALES = (1, 4, 16)


def write_corpus(params: Params, rows: int) -> None:
    """Random tokens, one document a row."""

    generator = np.random.default_rng(0)
    writer = SplitWriter(params.paths.corpus, "train", row_length=128, vocab_size=300)
    for first in range(0, rows, 256):
        last = min(first + 256, rows)
        tokens = generator.integers(0, 300, (last - first, 128))
        doc_ids = np.repeat(np.arange(first, last, dtype=np.int32)[:, None], 128, axis=1)
        writer.add(Rows(tokens=tokens, doc_ids=doc_ids, in_loss=np.ones_like(tokens, dtype=bool)))
    writer.commit(num_text_bytes=0, tokenizer_sha256=hash_tokenizer(params.paths.teacher))


def capture(params: Params) -> float:
    """MiB that a capture takes at its peak beyond the loaded teacher."""
    corpus = CorpusSplit(params.paths.corpus, "train")
    teacher = HuggingFaceTeacher(
        params.paths.teacher,
        vocab_size=300,
        dtype=DTYPES[params.prepare.dtype],
        device=pick_device("cpu"),
    )
    fingerprint = fingerprint_of(params, corpus, teacher.dtype)
    before = forget_peak("cpu")
    work = open_capture(teacher, corpus, fingerprint, params)
    work.run(work.writer.missing())
    return peak_mib("cpu") - before


def read(params: Params) -> float:
    """MiB that one epoch of shuffled batches takes at its peak."""
    reader = CacheReader(params.paths.logits, CorpusSplit(params.paths.corpus, "train"))
    before = forget_peak("cpu")
    stream = BatchStream(
        CachedTargets(reader), batch_rows=32, window_shards=params.train.shuffle_shards, seed=0
    )
    batches = stream.starting_at(0)
    for _ in range(len(reader.corpus) // 32):
        next(batches)
    batches.close()
    return peak_mib("cpu") - before


# 2,048 rows of 128 tokens are 70 MB of TopK in the formats that losses take.
@click.command()
@click.option("--rows", default=2048, help="Rows of the smallest corpus.")
def main(rows: int) -> None:
    """Print the table."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.conftest import make_teacher, tiny_values

    base: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher = make_teacher(folder / "teacher")
        for scale in SCALES:
            values = tiny_values(teacher, folder, folder / f"x{scale}")
            values["paths"]["teacher"] = str(teacher)
            values["prepare"] |= {"k": 64, "shard_rows": 64, "chunk_rows": 16}
            values["capture"]["batch_rows"] = 16
            values["train"]["shuffle_shards"] = 4
            file = folder / f"x{scale}.yaml"
            file.write_text(yaml.safe_dump(values))
            params = load_params(file)
            write_corpus(params, rows * scale)
            for what in (capture, read):
                mib = in_child(what, params)
                ratio = mib / base.setdefault(what.__name__, mib)
                print(
                    f"corpus x{scale:<3} {what.__name__:8} {mib:7.1f} MiB, {ratio:.2f}", flush=True
                )


if __name__ == "__main__":
    main()
