"""Steps and shapes that several tests share."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.capture.local import Capture, CaptureResult, fingerprint_of, open_capture
from pipeline.config.params import Params
from pipeline.data.corpus_zarr import SPLITS, CorpusSplit
from pipeline.evaluation.compare import Comparison, compare
from pipeline.evaluation.models import open_models
from pipeline.io.object_store import LocalFolder
from pipeline.io.zarr_groups import write_group
from pipeline.io.zarr_shards import object_hash
from pipeline.logit_cache.reader import CacheReader
from pipeline.report import read_curves
from pipeline.runtime.device import DTYPES
from pipeline.teacher.transformers import HuggingFaceTeacher
from pipeline.training import trainer
from pipeline.training.run import run_training

SMALL = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 304,
}
"""A student that starts at random, for the tiny corpus."""

RISING = {
    "steps": 8,
    "warmup_steps": 8,
    "learning_rate": 0.3,
    "eval_every": 1,
    "keep_best": True,
}
"""Training whose rate rises until the student is thrown far off: a step in between is the best."""


def live_teacher(params: Params) -> HuggingFaceTeacher:
    """The teacher of params on the CPU."""
    return HuggingFaceTeacher(
        params.paths.teacher,
        vocab_size=CorpusSplit(params.paths.corpus, "train").info.vocab_size,
        dtype=DTYPES[params.prepare.dtype],
        device=torch.device("cpu"),
        head_chunk=params.capture.head_chunk,
    )


def judge(params: Params, folders: dict[str, Path]) -> Comparison:
    """Models against the live teacher on the validation rows, on the CPU."""
    corpus = CorpusSplit(params.paths.corpus, "validation")
    teacher = live_teacher(params)
    models = open_models(
        folders, corpus, params.paths.teacher, dtype=teacher.dtype, device=teacher.device
    )
    return compare(teacher, models, corpus, params.evaluate, params.prepare.document_mask)


def make_capture(params: Params, split: str, *, repair: bool = False) -> Capture:
    """The capture of one split as stages/prepare.py makes it."""
    corpus = CorpusSplit(params.paths.corpus, split)
    fingerprint = fingerprint_of(params, corpus, DTYPES[params.prepare.dtype])
    return open_capture(live_teacher(params), corpus, fingerprint, params, repair=repair)


def capture_all(params: Params, *, repair: bool = False) -> list[CaptureResult]:
    """What stages/prepare.py does, as a call."""
    results = []
    for split in SPLITS:
        capture = make_capture(params, split, repair=repair)
        results.append(capture.run(capture.writer.missing()))
    return results


def open_cache(params: Params, split: str = "train", k: int | None = None) -> CacheReader:
    """A reader of the cache bound to its corpus."""
    return CacheReader(params.paths.logits, CorpusSplit(params.paths.corpus, split), k=k)


def rewrite_checksums(folder: Path) -> None:
    """Make a split's checksums fit what its shards hold now, but for the sha256 of its rows."""
    store, split = LocalFolder(folder), CorpusSplit(folder.parent, folder.name)
    objects: dict[str, list[tuple[int, str]]] = {}
    for name, spec in split._specs.items():
        shards = [(key, store.read(key)) for key in map(spec.key_of, range(spec.num_shards))]
        objects[name] = [(len(data), object_hash(key, data)) for key, data in shards]
    text = json.dumps(objects).encode()
    store.write("objects.json", text)
    info = replace(split.info, objects=(len(text), object_hash("objects.json", text)))
    write_group(store, list(split._specs.values()), asdict(info), replace=True)


def run_with_power_cut(params: Params, name: str, *, before_step: int) -> None:
    """A run whose process dies between two steps."""
    take_step = trainer._train_step

    def dies(*args: Any, **options: Any) -> Any:
        if args[3].step == before_step:
            raise RuntimeError("power cut")
        return take_step(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_train_step", dies)
        with pytest.raises(RuntimeError, match="power cut"):
            run_training(params, name)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def losses(folder: Path) -> dict[str, tuple[list[float], list[float]]]:
    curves = read_curves(folder / "dvclive" / "plots" / "metrics")
    return {
        name: curve for name, curve in curves.items() if "second" not in name and "wait" not in name
    }


def assert_same_run(one: Path, two: Path) -> None:
    assert losses(one) == losses(two)
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
