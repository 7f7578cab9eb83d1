"""Steps and shapes that several tests share."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from pipeline.capture.capture import Capture, CaptureResult, fingerprint_of, open_capture
from pipeline.config.params import Params
from pipeline.data.corpus_zarr import (
    OBJECTS,
    SPLITS,
    CorpusSplit,
    hash_rows,
    objects_key,
)
from pipeline.evaluation.compare import Comparison, compare
from pipeline.evaluation.models import open_models
from pipeline.io.folders import LocalFolder
from pipeline.io.zarr_groups import write_group
from pipeline.io.zarr_shards import entry_of
from pipeline.logit_cache.reader import CacheReader
from pipeline.report import read_curves
from pipeline.runtime.batch_sizes import resolve_head_chunk
from pipeline.runtime.device import DTYPES
from pipeline.targets.topk import TopK
from pipeline.teacher.teacher import Teacher
from pipeline.teacher.transformers import HuggingFaceTeacher
from pipeline.training import trainer
from pipeline.training.run import run_training
from pipeline.verify.gate import run_gate
from pipeline.verify.gate_report import GateReport, HistogramBin

ROOT = Path(__file__).parents[1]


RunPython = Callable[..., subprocess.CompletedProcess[str]]


TINY: dict[str, dict[str, Any]] = {
    "corpus": {
        "source": "files",
        "train_tokens": 3000,
        "validation_tokens": 600,
        "row_length": 32,
        "max_document_tokens": None,
    },
    "advise": {"ks": [4, 16, 64]},
    "prepare": {
        "k": 16,
        "dtype": "float32",
        "chunk_rows": 4,
        "shard_rows": 16,
    },
    "capture": {"batch_rows": 4, "head_chunk": 50},
    "verify": {"batches": 20, "noise_batches": 5},
    "student": {"layers": [0, 2]},
    "train": {
        "dtype": "float32",
        "steps": 8,
        "batch_rows": 4,
        "warmup_steps": 2,
        "learning_rate": 0.003,
        "min_learning_rate": 0.0003,
        "shuffle_shards": 2,
        "eval_every": 4,
        "eval_rows": 8,
    },
    "run": {"head_chunk": 50, "checkpoint_every": 2, "min_retained_mass": 0.0},
    "evaluate": {"dtype": "float32", "prompts": ["the cat"], "max_new_tokens": 3},
    "humaneval": {"dtype": "float32", "max_new_tokens": 12, "batch_rows": 2, "workers": 2},
    "export": {"prompts": 4, "prompt_tokens": 8, "max_new_tokens": 4, "lines": 12},
}


def tiny_values(teacher: Path, text: Path, work: Path) -> dict[str, Any]:
    """The project's params.yaml with everything made small and put under `work`."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["device"] = "cpu"
    values["paths"] = {
        name: path and str(work / Path(path).relative_to("cache"))
        for name, path in values["paths"].items()
    }
    values["teacher"]["source"] = "folder"
    values["teacher"]["folder"]["path"] = str(teacher)
    values["corpus"]["files"] = {"paths": [str(text / "*.jsonl")], "column": "text"}
    for section, changes in TINY.items():
        values[section] |= changes
    return values


def change(params: Params, **sections: dict[str, Any]) -> Params:
    """Params with some keys of some sections changed, checked again."""
    values = params.model_dump(mode="json")
    for section, changes in sections.items():
        values[section] |= changes
    return Params.model_validate(values)


LORA: dict[str, Any] = {
    "rank": 4,
    "alpha": 8.0,
    "dropout": 0.0,
    "targets": ["q_proj", "v_proj", "down_proj"],
}


def from_folder(params: Params, folder: Path, **student: Any) -> Params:
    return change(params, student={"init": "checkpoint", "checkpoint": str(folder)} | student)


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
        head_chunk=resolve_head_chunk(params.capture.head_chunk, 300, None),
    )


def judge(params: Params, folders: dict[str, Path]) -> Comparison:
    """Models against the live teacher on the validation rows, on the CPU."""
    corpus = CorpusSplit(params.paths.corpus, "validation")
    teacher = live_teacher(params)
    models = open_models(
        folders,
        corpus,
        params.paths.teacher,
        dtypes=dict.fromkeys(folders, teacher.dtype),
        device=teacher.device,
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


def gate(params: Params, teacher: Teacher | None = None, *, seed: int = 0) -> GateReport:
    """The gate's judgement of the cache, by default with the live teacher of params."""
    return gate_and_histogram(params, teacher, seed=seed)[0]


def gate_and_histogram(
    params: Params, teacher: Teacher | None = None, *, seed: int = 0
) -> tuple[GateReport, list[HistogramBin]]:
    splits = [
        (CorpusSplit(params.paths.corpus, split), open_cache(params, split)) for split in SPLITS
    ]
    return run_gate(teacher or live_teacher(params), splits, params.verify, seed=seed)


def rewrite_cache(
    params: Params, change_rows: Callable[[TopK], TopK], *, split: str = "train"
) -> None:
    """Commit other contents under good markers, as a defect of ours would have."""
    reader = open_cache(params, split)
    changed = change_rows(reader.top_k(np.arange(len(reader.corpus))))
    writer = make_capture(params, split).writer
    for shard in range(writer.layout.num_shards):
        start, stop = writer.layout.rows_of(shard)
        writer.write(shard, changed[start:stop], hash_rows(reader.corpus.rows(start, stop)))


def rewrite_checksums(folder: Path) -> None:
    """Make a split's checksums fit what its shards hold now, but for the sha256 of its rows."""
    store, split = LocalFolder(folder), CorpusSplit(folder.parent, folder.name)
    shards: dict[str, list[tuple[int, str]]] = {}
    for name, spec in split._specs.items():
        keys = map(spec.key_of, range(spec.num_shards))
        shards[name] = [entry_of(key, store.read(key)) for key in keys]
    text = json.dumps(asdict(replace(split.objects, shards=shards))).encode()
    info = replace(split.info, objects=entry_of(OBJECTS, text))
    store.write(objects_key(info.objects), text)
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


def every_sample(topk: TopK) -> Tensor:
    """All sampled ids of a TopK [n, ...], repeated ones included, in stored order: [n, M]."""
    rows = zip(topk.sampled_ids, topk.sampled_counts, strict=True)
    return torch.stack([ids.repeat_interleave(counts) for ids, counts in rows])
