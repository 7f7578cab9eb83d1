"""One training run: build the student, choose the teacher, train, save; a folder under runs/.

<runs>/<name>/model/         the trained student, a Hugging Face folder with the tokenizer
<runs>/<name>/run.json       what the run was made from; another run in its place is refused
<runs>/<name>/dvclive/       metrics and curves
<runs>/<name>/checkpoints/   only while the run is unfinished; with paths.checkpoints, <name> there,
                             and a copy of run.json, so that another machine can take over
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Params, StudentParams
from pipeline.data.rows import CorpusSplit
from pipeline.errors import MismatchError, ParamsError
from pipeline.model.student import ModelConfig, StudentModel
from pipeline.model.weights import hash_weights, load_student, save_student
from pipeline.runtime import DTYPES, pick_device, pick_dtype, say, seed_everything
from pipeline.storage import Folder, open_folder
from pipeline.store.reader import CacheReader
from pipeline.teacher.base import NoTeacher, Teacher
from pipeline.teacher.cached import CachedTeacher
from pipeline.teacher.hf import HuggingFaceTeacher
from pipeline.teacher.online import OnlineTeacher
from pipeline.training.batches import BatchStream, first_rows
from pipeline.training.checkpoint import Checkpoints, TrainState
from pipeline.training.trainer import Validation, retained_mass, train

_WITHOUT_EFFECT = {"checkpoint_every", "log_every", "min_retained_mass", "max_skipped_steps"}
"""Parameters of `train` that may change when a run is continued."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended; `state` is None when it had been finished before."""

    folder: Path
    state: TrainState | None
    parameters: int


def run_training(params: Params, name: str, *, overwrite: bool = False) -> RunResult:
    """Train the student that `params` describe as run `name`, or continue it.

    Args:
        overwrite: discard a run of that name made from other parameters instead of refusing.

    Raises:
        MismatchError: cache, corpus, teacher or an earlier run of that name do not belong together.
        ParamsError: the student cannot express the teacher's vocabulary, and the like.
    """
    corpus = CorpusSplit(params.paths.corpus, "train")
    held_out = CorpusSplit(params.paths.corpus, "validation")
    folder = params.paths.runs / name
    checkpoints = Checkpoints(
        params.paths.checkpoints / name if params.paths.checkpoints else folder / "checkpoints"
    )
    if _claim(folder, checkpoints, _identity(params, corpus), overwrite):
        return RunResult(folder, None, load_student(folder / "model").count_parameters())
    device = pick_device(params.device)
    seed_everything(params.seed)
    student = build_student(params.student, params.paths.teacher)
    _require_vocabulary(student.config, corpus)
    training, validation = _teachers(params, device, corpus, held_out)
    stream = BatchStream(
        training,
        batch_rows=params.train.batch_rows,
        window_shards=params.train.shuffle_shards,
        seed=params.seed,
        pin=device.type == "cuda",
    )
    _warn_of_lost_mass(training, params)
    state = train(
        student.to(device),
        stream,
        Validation(validation, params.train.eval_rows),
        params.train,
        folder,
        checkpoints,
        DTYPES[params.train.dtype],
    )
    save_student(student, folder / "model", tokenizer_from=params.paths.teacher)
    checkpoints.remove()
    return RunResult(folder, state, student.count_parameters())


def build_student(params: StudentParams, teacher: Path) -> StudentModel:
    """A student at random, from a checkpoint, or from chosen layers of the teacher."""
    if params.init == "layers":
        return load_student(teacher, params.layers)
    if params.init == "checkpoint":
        if params.checkpoint is None:
            raise ParamsError("student.init=checkpoint needs student.checkpoint, a model folder")
        return load_student(params.checkpoint)
    shape = params.model_dump(exclude={"init", "checkpoint", "layers"})
    return StudentModel(ModelConfig(**shape))


def _require_vocabulary(student: ModelConfig, corpus: CorpusSplit) -> None:
    """Vocabularies are matched by shared ids, from 0 to the tokenizer's largest.

    The number of embedding rows may differ between teacher and student (Qwen2.5: 151,936 or
    152,064 rows, 151,665 tokenizer ids): rows beyond the tokenizer never occur, are left out of the
    teacher's sums, and count as ids without teacher mass for the student. A student with fewer rows
    than the tokenizer has ids cannot even embed the text.
    """
    if student.vocab_size < corpus.info.vocab_size:
        raise ParamsError(
            f"the student has {student.vocab_size} vocabulary rows, the corpus uses a tokenizer of "
            f"{corpus.info.vocab_size} ids: set student.vocab_size to at least that"
        )
    if student.max_seq_len < corpus.info.row_length:
        raise ParamsError(
            f"student.max_seq_len={student.max_seq_len} is less than the corpus's row length "
            f"{corpus.info.row_length}: enlarge it, or shorten corpus.row_length"
        )


def _teachers(
    params: Params, device: torch.device, corpus: CorpusSplit, held_out: CorpusSplit
) -> tuple[Teacher, Teacher]:
    """The teacher of training and of validation rows."""
    shard_rows, attention = params.prepare.shard_rows, params.prepare.attention
    if params.train.teacher == "none":
        plain, held_out_plain = (
            NoTeacher(split, shard_rows=shard_rows, attention=attention)
            for split in (corpus, held_out)
        )
        return plain, held_out_plain
    if params.train.teacher == "cached":
        readers = [
            CacheReader(params.paths.logits, split, k=params.train.k)
            for split in (corpus, held_out)
        ]
        for reader in readers:
            _require_same_teacher(reader, params.paths.teacher)
        return CachedTeacher(readers[0]), CachedTeacher(readers[1])
    temperature = params.train.temperature
    live = HuggingFaceTeacher(
        params.paths.teacher,
        vocab_size=corpus.info.vocab_size,
        dtype=pick_dtype(params.prepare.dtype, device),
        device=device,
        head_chunk=params.prepare.head_chunk,
    )
    training, validation = (
        OnlineTeacher(
            live,
            split,
            k=params.prepare.k if params.train.k is None else params.train.k,
            draws=params.prepare.draws,
            seed=params.seed,
            temperatures=() if temperature == 1.0 else (temperature,),
            shard_rows=shard_rows,
            attention=attention,
        )
        for split in (corpus, held_out)
    )
    return training, validation


def _require_same_teacher(reader: CacheReader, teacher: Path) -> None:
    """Training needs no teacher, but where one is at hand it must be the cache's."""
    if not teacher.exists():
        return
    found = hash_weights(teacher)
    if found != reader.fingerprint.teacher_sha256:
        raise MismatchError(
            f"{reader.address} was captured from teacher {reader.fingerprint.teacher_sha256[:12]}, "
            f"{teacher} holds {found[:12]}: capture again with stages/prepare.py --overwrite, or "
            "fetch the other teacher"
        )


def _warn_of_lost_mass(teacher: Teacher, params: Params) -> None:
    temperature = params.train.temperature
    batch = next(first_rows(teacher, params.train.batch_rows, params.train.batch_rows))
    if batch.topk is None:
        return
    if batch.topk.draws and temperature != 1.0:
        say(
            f"warning: the cache's draws were taken at temperature 1; at temperature "
            f"{temperature:g} they stand for it on average, but their weights vary widely: set "
            "train.temperature to 1, or capture with prepare.draws=0"
        )
    mass = retained_mass(batch, temperature)
    if mass < params.train.min_retained_mass:
        say(
            f"warning: at temperature {temperature:g} the kept ids hold {mass:.1%} of the "
            f"teacher's mass, less than train.min_retained_mass="
            f"{params.train.min_retained_mass:g}: lower the temperature or store more ids"
        )


def _identity(params: Params, corpus: CorpusSplit) -> dict[str, Any]:
    """What a run is made from; two runs with the same identity are the same run."""
    identity: dict[str, Any] = params.model_dump(mode="json", include={"seed", "student"})
    identity["train"] = params.train.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
    identity["corpus_sha256"] = corpus.info.sha256
    identity["shard_rows"] = params.prepare.shard_rows  # by which rows are shuffled
    if params.train.teacher == "cached":
        reader = CacheReader(params.paths.logits, corpus)
        identity["cache"] = reader.layout.about()
        identity["shard_rows"] = reader.layout.shard_rows
    else:
        identity["attention"] = params.prepare.attention
    if params.train.teacher == "online":
        kept = params.prepare.model_dump(mode="json", include={"k", "draws", "dtype"})
        identity |= {"online": kept, "teacher_sha256": hash_weights(params.paths.teacher)}
    if params.student.init == "layers":
        identity["start_sha256"] = hash_weights(params.paths.teacher)
    if params.student.init == "checkpoint" and params.student.checkpoint is not None:
        identity["start_sha256"] = hash_weights(params.student.checkpoint)
    return dict(json.loads(json.dumps(identity)))  # as it is read back: tuples are lists


def _claim(
    folder: Path, checkpoints: Checkpoints, identity: dict[str, Any], overwrite: bool
) -> bool:
    """Take the folder for this run; returns whether the run is finished already."""
    finished = (folder / "model").exists()
    places = [open_folder(folder), open_folder(checkpoints.address)]
    if finished or checkpoints.names():
        if difference := _difference(_first_json(places, "run.json"), identity):
            if not overwrite:
                raise MismatchError(
                    f"{folder} holds a run with other parameters ({difference}): add --overwrite to"
                    " replace it, or choose another --run"
                )
            checkpoints.remove()
            open_folder(folder).remove()
        elif finished:
            return True
    text = json.dumps(identity, indent=2) + "\n"
    for place in places:
        place.write("run.json", text.encode())
    return False


def _first_json(places: Sequence[Folder], key: str) -> dict[str, Any]:
    """The JSON object under a key of the first place that has it; empty where none has."""
    for place in places:
        try:
            return dict(json.loads(place.read(key)))
        except FileNotFoundError:
            continue
    return {}


def _difference(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str:
    """The first key at which two identities differ, with both values; empty when none does."""
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            if inner := _difference(old, new, f"{prefix}{key}."):
                return inner
        elif old != new:
            return f"{prefix}{key}={old}, now {new}"
    return ""
