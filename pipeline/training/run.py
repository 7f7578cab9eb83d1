"""One training run: build the student, choose the teacher, train, and save to a folder under runs/.

<runs>/<name>/model/         the trained student, a Hugging Face folder with the tokenizer; weights
                             of the last step, or of the lowest validation loss with train.keep_best
<runs>/<name>/adapter/       with student.lora: the adapter alone, to apply to student.checkpoint
<runs>/<name>/run.json       the run's inputs; a run with other inputs is refused in this folder
<runs>/<name>/dvclive/       metrics and curves
<runs>/<name>/checkpoints/   only while the run is unfinished; with paths.checkpoints they are in
                             <name> there, with a copy of run.json for another machine to take over
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.config.params import Params
from pipeline.config.resolved import resolve
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.vocabulary import require_tokenizer
from pipeline.errors import MismatchError, ParamsError, shortened
from pipeline.io.files import read_json_object, write_json
from pipeline.io.folders import Folder, open_folder
from pipeline.io.ownership import claim, find_damage, lock, require_ours
from pipeline.logit_cache.reader import CacheReader
from pipeline.losses.divergences import require_expressible
from pipeline.model.folder import hash_weights, teacher_folder
from pipeline.model.named_models import run_folder
from pipeline.runtime.batch_sizes import gpu_memory, resolve_head_chunk
from pipeline.runtime.console import say
from pipeline.runtime.device import dtype_name, seed_everything, training_dtype
from pipeline.runtime.ranks import Ranks, join_ranks
from pipeline.target_sources.cached import CachedTargets
from pipeline.target_sources.online import OnlineTargets
from pipeline.target_sources.target_source import TargetSource
from pipeline.target_sources.tokens_only import TokensOnly
from pipeline.teacher.engines import describe_engine, open_teacher, teacher_dtype
from pipeline.training.batches import BatchStream, first_rows
from pipeline.training.checkpoint import Checkpoints, TrainState
from pipeline.training.distillation import DistillationLoss
from pipeline.training.distributed import gather_parameters, parallelise
from pipeline.training.students import RunStudent, start_folder
from pipeline.training.trainer import train
from pipeline.training.validation import Validation, retained_mass

_FOLDERS = ("model", "adapter")
"""Folders of a run with their own mark, which tells --overwrite what it may remove."""


@dataclass(frozen=True)
class RunResult:
    """The result of a run; if it had finished before, `state` is None and nothing is counted."""

    folder: Path
    state: TrainState | None
    parameters: int = 0
    trained_parameters: int = 0  # fewer than `parameters` with adapters
    dtype: str = ""  # name of autocast's dtype


def run_training(params: Params, name: str, *, overwrite: bool = False) -> RunResult:
    """Train the student that `params` describe as run `name`, or continue that run.

    If torchrun started this process, it is one of several that train together.

    Args:
        overwrite: discard an existing run of that name that was made from other parameters or has
            no undamaged checkpoint, instead of refusing.

    Raises:
        MismatchError: cache, corpus, teacher or an earlier run of that name do not belong together.
        ParamsError: a parameter does not fit, for example the student cannot express the teacher's
            vocabulary.
    """
    folder = run_folder(params.paths.runs, name)  # --overwrite deletes this folder
    with join_ranks(params.device) as ranks, ExitStack() as stack:
        ranks.on_first(lambda: _lock(stack, params, folder))
        return _run(params, folder, overwrite, ranks)


def _lock(stack: ExitStack, params: Params, folder: Path) -> None:
    """Lock the run against other processes, and its checkpoints if they are stored elsewhere."""
    stack.enter_context(lock(folder, "give this run another name by --run"))
    if elsewhere := params.paths.checkpoints:
        remedy = "set paths.checkpoints to another place"
        stack.enter_context(lock(elsewhere / folder.name, remedy))


def _run(params: Params, folder: Path, overwrite: bool, ranks: Ranks) -> RunResult:
    _require_rows(params, ranks)
    corpus = CorpusSplit(params.paths.corpus, "train")
    params = resolve(params, train_rows=len(corpus), num_ids=corpus.info.vocab_size)
    held_out = CorpusSplit(params.paths.corpus, "validation")
    checkpoints = Checkpoints(
        params.paths.checkpoints / folder.name
        if params.paths.checkpoints
        else folder / "checkpoints",
        ranks,
        start_again=overwrite,
    )
    dtype = _same_dtype(params, ranks)
    recipe = params.train.model_copy(update={"dtype": dtype_name(dtype)})
    params = params.model_copy(update={"train": recipe})
    identity = _identity(params, corpus, ranks.device)
    if ranks.on_first(lambda: _claim(folder, checkpoints, identity, overwrite)):
        return RunResult(folder, None)
    seed_everything(params.seed)
    student = RunStudent(params, corpus, held_out)
    if ranks.rank:  # all ranks start from the same student, but each draws its own dropout
        seed_everything((params.seed + ranks.rank) % 2**32)
    trained = student.model.count_parameters(trained_only=True)
    training, validation = _target_sources(params, ranks.device, corpus, held_out)
    stream = BatchStream(
        training,
        batch_rows=params.train.batch_rows,
        window_shards=params.train.shuffle_shards,
        seed=params.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        pin=ranks.device.type == "cuda",
    )
    _warn_of_lost_mass(training, params)
    head_chunk = resolve_head_chunk(
        params.run.head_chunk, len(student.model.head_weight), gpu_memory(ranks.device)
    )
    step = DistillationLoss(student.model, dtype=dtype, head_chunk=head_chunk)
    state = train(
        parallelise(step, ranks, params.run),
        student.model,
        stream,
        Validation(validation, params.train.eval_rows),
        params,
        folder,
        checkpoints,
        ranks,
    )
    gather_parameters(student.model, ranks)
    ranks.on_first(lambda: student.save(folder))
    ranks.on_first(lambda: _sign(folder))
    ranks.on_first(checkpoints.remove)
    return RunResult(folder, state, student.model.count_parameters(), trained, dtype_name(dtype))


def _require_rows(params: Params, ranks: Ranks) -> None:
    if params.train.batch_rows < ranks.world_size:
        raise ParamsError(
            f"train.batch_rows={params.train.batch_rows} rows cannot be shared among "
            f"{ranks.world_size} ranks: set it to a multiple of {ranks.world_size}, "
            "or start fewer processes"
        )


def _target_sources(
    params: Params, device: torch.device, corpus: CorpusSplit, held_out: CorpusSplit
) -> tuple[TargetSource, TargetSource]:
    """Return the target sources of the training rows and of the validation rows."""
    shard_rows, document_mask = params.prepare.shard_rows, params.prepare.document_mask
    if params.train.targets == "none":
        plain, held_out_plain = (
            TokensOnly(split, shard_rows=shard_rows, document_mask=document_mask)
            for split in (corpus, held_out)
        )
        return plain, held_out_plain
    if params.train.targets == "cached":
        readers = [
            CacheReader(params.paths.logits, split, k=params.train.k)
            for split in (corpus, held_out)
        ]
        for reader in readers:
            _require_same_teacher(reader, teacher_folder(params.paths.teacher))
        return CachedTargets(readers[0]), CachedTargets(readers[1])
    if params.prepare.engine == "vllm":
        raise ParamsError(
            "train.targets=online runs the teacher beside the student, and prepare.engine=vllm "
            "would take the memory that training needs: capture with stages/prepare.py and set "
            "train.targets=cached, or set prepare.engine=transformers"
        )
    require_tokenizer(teacher_folder(params.paths.teacher), corpus)
    if params.prepare.parallel != "auto":
        raise ParamsError(
            f"prepare.parallel={params.prepare.parallel} divides a teacher in prepare and verify, "
            "and with train.targets=online each rank holds it whole: set prepare.parallel=auto, or "
            "capture a cache and set train.targets=cached"
        )
    temperature = params.train.temperature
    live = open_teacher(params, corpus.info.vocab_size, teacher_dtype(params, device), device)
    training, validation = (
        OnlineTargets(
            live,
            split,
            k=params.prepare.k if params.train.k is None else params.train.k,
            num_sampled=params.prepare.num_sampled,
            seed=params.seed,
            temperatures=() if temperature == 1.0 else (temperature,),
            top_p=params.prepare.top_p,
            entropy_quantile=params.prepare.stored_quantile,
            shard_rows=shard_rows,
            document_mask=document_mask,
        )
        for split in (corpus, held_out)
    )
    return training, validation


def _require_same_teacher(reader: CacheReader, teacher: Path) -> None:
    """Refuse another teacher than the cache's; training needs none, but one may be present.

    Nothing says which weights an imported cache came from: `verify` compares it with a teacher.
    """
    if reader.fingerprint.imported_from or not (teacher / "config.json").exists():
        return
    found = hash_weights(teacher)
    if found != reader.fingerprint.teacher_sha256:
        raise MismatchError(
            f"{reader.address} was captured from teacher {reader.fingerprint.teacher_sha256[:12]}, "
            f"{teacher} holds {found[:12]}: capture again with stages/prepare.py --overwrite, or "
            "fetch the other teacher"
        )


def _warn_of_lost_mass(source: TargetSource, params: Params) -> None:
    temperature = params.train.temperature
    batch = next(first_rows(source, params.train.batch_rows, params.train.batch_rows))
    if batch.topk is None:
        return
    require_expressible(params.train.divergence, batch.topk)
    if batch.topk.num_sampled and temperature != 1.0:
        say(
            f"warning: the cache's sampled ids were taken at temperature 1; at temperature "
            f"{temperature:g} they stand for it on average, but their weights vary widely: set "
            "train.temperature to 1, or capture with prepare.num_sampled=0"
        )
    mass = retained_mass(batch, temperature)
    if mass < params.run.min_retained_mass:
        say(
            f"warning: at temperature {temperature:g} the kept ids hold {mass:.1%} of the "
            f"teacher's mass, less than run.min_retained_mass="
            f"{params.run.min_retained_mass:g}: lower the temperature or store more ids"
        )


def _same_dtype(params: Params, ranks: Ranks) -> torch.dtype:
    """Return autocast's dtype, which `auto` must resolve to on all ranks alike."""
    dtype = training_dtype(params.train.dtype, ranks.device)
    found = sorted(set(ranks.gather(dtype_name(dtype))))
    if len(found) > 1:
        raise ParamsError(
            f"train.dtype=auto resolves to {' and '.join(found)} on the ranks' different hardware: "
            "set train.dtype to one of them"
        )
    return dtype


def _identity(params: Params, corpus: CorpusSplit, device: torch.device) -> dict[str, Any]:
    """Return the inputs of a run; two runs with the same identity are the same run."""
    teacher = teacher_folder(params.paths.teacher)
    identity: dict[str, Any] = params.model_dump(mode="json", include={"seed", "student", "train"})
    identity["corpus_sha256"] = corpus.info.sha256
    identity["shard_rows"] = params.prepare.shard_rows  # the order of shuffled rows depends on it
    if params.train.targets == "cached":
        reader = CacheReader(params.paths.logits, corpus)
        identity["cache"] = reader.layout.about()
        identity["shard_rows"] = reader.layout.shard_rows
    else:
        identity["document_mask"] = params.prepare.document_mask
    if params.train.targets == "online":
        names = {"k", "num_sampled", "top_p", "positions", "entropy_quantile"}
        kept = params.prepare.model_dump(mode="json", include=names)
        kept["dtype"] = dtype_name(teacher_dtype(params, device))
        kept["engine"] = describe_engine(params, "transformers")
        identity |= {"online": kept, "teacher_sha256": hash_weights(teacher)}
    if start := start_folder(params.student, teacher):
        identity["start_sha256"] = hash_weights(start)
    return dict(json.loads(json.dumps(identity)))  # as read back from JSON: tuples become lists


def _claim(
    folder: Path, checkpoints: Checkpoints, identity: dict[str, Any], overwrite: bool
) -> bool:
    """Claim the folder for this run; return whether the run has already finished."""
    ours = {name: require_ours(folder / name, name, key="paths.runs") for name in _FOLDERS}
    finished = ours["model"]
    places = [open_folder(folder), open_folder(checkpoints.address)]
    if finished or checkpoints.names():
        if difference := _refusal(folder, places, identity):
            if not overwrite:
                raise MismatchError(
                    f"{folder} {difference}: add --overwrite to replace it, or choose another --run"
                )
            checkpoints.remove()
            for name in ("run.json", *_FOLDERS, "dvclive"):
                open_folder(folder).remove(name)
        elif finished and not (damage := find_damage(folder / "model")):
            _sign(folder)
            return True
        elif finished:
            say(f"train: {folder / 'model'} is damaged ({damage}): it is trained again")
    claim(checkpoints.address, "checkpoints", key="paths.checkpoints")
    text = json.dumps(identity, indent=2) + "\n"
    for place in places:
        place.write("run.json", text.encode())
    return False


def _sign(folder: Path) -> None:
    """Add the model's hash to the run's metrics, as every later measurement does."""
    file = folder / "dvclive" / "metrics.json"
    if not file.exists():
        return
    write_json(file, read_json_object(file) | {"model_sha256": hash_weights(folder / "model")})


def _refusal(folder: Path, places: Sequence[Folder], identity: dict[str, Any]) -> str:
    """Explain why an existing run is not continued; return an empty text if it is the same run."""
    found = _first_json(places, "run.json")
    if found is None:
        return (
            "holds a run whose run.json is missing or damaged, so that nothing says what it was "
            "made from (restore a copy of run.json to keep the run)"
        )
    difference = _difference(found, identity)
    return f"holds a run with other parameters ({difference})" if difference else ""


def _first_json(places: Sequence[Folder], key: str) -> dict[str, Any] | None:
    """Return the first readable JSON object under `key` in the given places, or None."""
    for place in places:
        try:
            found = json.loads(place.read(key))
        except (FileNotFoundError, ValueError, RecursionError):
            continue
        if isinstance(found, dict) and found:
            return found
    return None


def _difference(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str:
    """Return the first key at which two identities differ, with both values, or an empty text."""
    for key in before | now:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            if inner := _difference(old, new, f"{prefix}{key}."):
                return inner
        elif old != new:
            return f"{prefix}{key[:60]}={_brief(old)}, now {_brief(new)}"
    return ""


def _brief(value: object) -> str:
    """Return the value as text, shortened if it is long, but still recognisable."""
    return str(value) if len(str(value)) <= 80 else shortened(value)
