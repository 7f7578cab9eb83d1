"""Size, time and memory of each stage, from params and shapes, without teacher, corpus or GPU.

A time is a number of operations divided by the device's peak times advise.mfu, so it is
only as good as that share; a run's own train/tokens_per_second, and `advise` on a sample, measure
it. Several devices are assumed to share work without loss, except that one device computes the head
of a teacher that they share; transfers between them are not counted. This package's constants hold
the other assumptions, each with its measurement.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.config.params import Params
from pipeline.config.resolved import resolve
from pipeline.config.section import Dtype
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.errors import DecantError, ParamsError
from pipeline.model.folder import teacher_folder
from pipeline.planning.advise import break_even_epochs
from pipeline.planning.cache_size import CORPUS_BYTES, CacheSize, Mode, cache_size
from pipeline.planning.costs import (
    FITS,
    capture_memory,
    evaluation_memory,
    planned_batch_rows,
    step_operations,
    training_memory,
    with_sizes,
)
from pipeline.planning.decoder_shape import Shape
from pipeline.planning.devices import DEVICES
from pipeline.planning.shapes import student_shape, teacher_shape, tokenizer_ids
from pipeline.planning.teacher_sharing import Sharing, share_teacher

TOKENIZED = 2.1e5  # tokens per second on one processor, by `build_corpus` of Python's library
READ = 1.8e6  # tokens per second read and decoded by two threads beside a device (cache_speed.py)
WRITTEN = 0.35e6  # tokens per second encoded and committed by two threads (cache_speed.py)
NOISE_COPIES = 3  # copies of a row in a forward of the noise floor (pipeline/verify/gate.py)
MODES = (
    Mode(k=64),
    Mode(k=64, top_p=0.95),
    Mode(k=64, entropy_quantile=0.5),
    Mode(k=32),
    Mode(k=32, num_sampled=16),
    Mode(k=16),
    Mode(k=0, num_sampled=50),
)


@dataclass(frozen=True, kw_only=True)
class Extent:
    """The amount of text, and how much of it a run reads."""

    row_length: int
    train_rows: int
    held_out_rows: int
    share_in_loss: float  # share of the tokens, as the corpus counts them; 1 without a corpus
    run_tokens: int  # tokens read by the steps of a run with train.*
    validated_tokens: int  # tokens it also reads for validation, from step 0 on

    @property
    def tokens(self) -> int:
        """Tokens in both splits, assuming that no row is padded."""
        return (self.train_rows + self.held_out_rows) * self.row_length

    @property
    def epochs_per_run(self) -> float:
        """SoftmaxKernels of a run over the training split."""
        return self.run_tokens / (self.train_rows * self.row_length)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Tokens per second, on all devices together."""

    teacher: float  # teacher's forward over capture.batch_rows rows, in prepare.dtype; the head
    # runs on the positions in the loss alone
    student: float  # student's forward, in train.dtype
    train: float  # student's forward and backward
    checked: float  # teacher's forward over verify.batch_rows rows, in prepare.dtype
    judged_teacher: float  # teacher's forward over evaluate.batch_rows rows, as evaluate runs it
    judged_student: float  # student's forward, as evaluate runs it


@dataclass(frozen=True)
class StagePlan:
    """Output, time and memory of one stage; None if a value is not computed or is nothing."""

    name: str
    written: float | None  # bytes
    seconds: float | None
    memory: float | None  # bytes per device


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The computed plan of a project, for all stages."""

    teacher: str
    teacher_shape: Shape
    teacher_dtype: str
    sharing: Sharing  # the devices that share one teacher
    student: str
    student_shape: Shape
    student_dtype: str  # dtype of autocast
    evaluate_dtypes: tuple[str, str]  # of the teacher and of the student
    steps: int  # steps of a run with train.*
    extent: Extent
    rates: Rates
    stages: tuple[StagePlan, ...]
    cache: CacheSize  # with prepare.*
    modes: tuple[CacheSize, ...]  # other choices for the same corpus
    break_even: int | None  # epochs from which a cache costs no more than an online teacher

    @property
    def seconds(self) -> float:
        """Time of all stages, run one after the other."""
        return sum(stage.seconds or 0.0 for stage in self.stages)

    def stage(self, name: str) -> StagePlan:
        """Return the stage with that name."""
        return next(stage for stage in self.stages if stage.name == name)

    def metrics(self) -> dict[str, Any]:
        """Return the content of plan.json."""
        extent = {"tokens": self.extent.tokens, "epochs_per_run": self.extent.epochs_per_run}
        return asdict(self) | extent | {"seconds": self.seconds}


def make_plan(params: Params) -> Plan:
    """Compute the plan of params.

    Raises:
        ParamsError: a model's shape is unknown, the corpus has no stated size, prepare.k or
            student.layers exceed the teacher's vocabulary or layers, or a stage would refuse its
            dtype on the device.
    """
    folder = teacher_folder(params.paths.teacher)
    teacher_name, teacher = teacher_shape(params.teacher, folder)
    num_ids, said = tokenizer_ids(params, folder, teacher)
    params = _settled(params, num_ids)
    if params.prepare.k > teacher.vocab_size:
        raise ParamsError(
            f"prepare.k={params.prepare.k} exceeds the {teacher.vocab_size} rows of the teacher's "
            "vocabulary: lower it"
        )
    student_name, student = student_shape(params.student, teacher)
    student_name += said
    device = DEVICES[params.advise.device]
    dtype = _inference_dtype(params, "prepare")
    extent = _extent(params)
    alone = capture_memory(teacher, params, dtype).total
    sharing = share_teacher(teacher, params, fits_alone=alone <= FITS * device.memory)
    rates = _rates(params, teacher, student, dtype, sharing, extent.share_in_loss)
    rows = (extent.train_rows, extent.held_out_rows)
    sizes = rows, extent.row_length, params.prepare, extent.share_in_loss
    cache, *modes = (
        cache_size(mode, teacher.vocab_size, *sizes) for mode in (Mode.of(params.prepare), *MODES)
    )
    live = _groups(params, sharing) / rates.teacher  # seconds per token of one teacher
    return Plan(
        teacher=teacher_name,
        teacher_shape=teacher,
        teacher_dtype=dtype,
        sharing=sharing,
        student=student_name,
        student_shape=student,
        student_dtype=params.train.dtype,
        evaluate_dtypes=_judged_dtypes(params),
        steps=params.train.num_steps,
        extent=extent,
        rates=rates,
        stages=_stages(params, teacher, student, extent, rates, cache.total, dtype, sharing),
        cache=cache,
        modes=tuple(modes),
        break_even=break_even_epochs(live + 1.0 / WRITTEN, live, 1.0 / READ),
    )


def _inference_dtype(params: Params, section: Literal["prepare", "evaluate"]) -> str:
    """Resolve prepare.dtype or evaluate.dtype on the planned device, as the stage would."""
    asked, device = getattr(params, section).dtype, DEVICES[params.advise.device]
    if asked != "auto":
        return _possible(asked, params, f"{section}.dtype")
    if device.is_gpu:
        return "float16"
    return "bfloat16" if device.has_bfloat16 else "float32"


def _training_dtype(params: Params) -> Dtype:
    """Resolve train.dtype on the planned device, as the stage would."""
    device = DEVICES[params.advise.device]
    if params.train.dtype != "auto":
        return _possible(params.train.dtype, params, "train.dtype")
    if device.has_bfloat16:
        return "bfloat16"
    return "float16" if device.is_gpu else "float32"


def _judged_dtypes(params: Params) -> tuple[str, str]:
    """Return the dtypes of teacher and students in evaluate; train.dtype must be resolved."""
    if params.evaluate.dtype == "auto" and DEVICES[params.advise.device].is_gpu:
        return _inference_dtype(params, "prepare"), params.train.dtype
    judged = _inference_dtype(params, "evaluate")
    return judged, judged


def _possible(dtype: Dtype, params: Params, key: str) -> Dtype:
    name = params.advise.device
    device = DEVICES[name]
    if dtype == "bfloat16" and device.is_gpu and not device.has_bfloat16:
        raise ParamsError(
            f"{key}=bfloat16, but advise.device={name} has no bfloat16 units (NVIDIA GPUs have "
            "them from compute capability 8.0, Ampere, on), so the stage would refuse it: set "
            f"{key} to auto, float16 or float32"
        )
    return dtype


def _settled(params: Params, num_ids: int) -> Params:
    """Return the parameters with train.dtype, train.steps and student.vocab_size resolved."""
    train = params.train.model_copy(update={"dtype": _training_dtype(params)})
    params = params.model_copy(update={"train": train})
    return resolve(params, train_rows=_train_rows(params), num_ids=num_ids)


def _train_rows(params: Params) -> int:
    if params.corpus.train_tokens is None:
        raise ParamsError(
            "corpus.train_tokens=null takes all there is, which a plan cannot know: set a number, "
            "for the plan alone by --set"
        )
    return math.ceil(params.corpus.train_tokens / params.corpus.row_length)


def _extent(params: Params) -> Extent:
    corpus, train = params.corpus, params.train
    held_out = math.ceil(corpus.validation_tokens / corpus.row_length)
    validations = train.num_steps // train.eval_every + 1
    return Extent(
        row_length=corpus.row_length,
        train_rows=_train_rows(params),
        held_out_rows=held_out,
        share_in_loss=_share_in_loss(params),
        run_tokens=train.num_steps
        * train.batch_rows
        * train.gradient_accumulation_steps
        * corpus.row_length,
        validated_tokens=validations * min(train.eval_rows, held_out) * corpus.row_length,
    )


def _share_in_loss(params: Params) -> float:
    """Return the share of the training split's positions that are in the loss; 1 if none exists."""
    try:
        info = CorpusSplit(params.paths.corpus, "train").info
    except DecantError:  # there is no corpus yet, or none that can be read: a plan needs none
        return 1.0
    return info.num_in_loss / info.num_positions


def _groups(params: Params, sharing: Sharing) -> int:
    """Return how many teachers the devices hold."""
    return params.advise.devices // sharing.devices


def _rates(
    params: Params,
    teacher: Shape,
    student: Shape,
    dtype: str,
    sharing: Sharing,
    share_in_loss: float,
) -> Rates:
    device, length = DEVICES[params.advise.device], params.corpus.row_length
    share = params.advise.mfu * params.advise.devices
    judged_teacher, judged_student = _judged_dtypes(params)

    def rate(name: str, batch_rows: int, of_head: float = 1.0) -> float:
        """Return the rate of all teachers; the head runs on one of the devices that share one."""
        body = teacher.body_operations(length) / sharing.speedup(batch_rows)
        seconds = (body + of_head * 2.0 * teacher.head) / (params.advise.mfu * device.peak(name))
        return _groups(params, sharing) / seconds

    return Rates(
        teacher=rate(dtype, planned_batch_rows(params), share_in_loss),
        student=share * device.peak(params.train.dtype) / student.forward_operations(length),
        train=share * device.peak(params.train.dtype) / step_operations(student, params),
        checked=rate(dtype, params.verify.batch_rows),
        judged_teacher=rate(judged_teacher, params.evaluate.batch_rows),
        judged_student=share * device.peak(judged_student) / student.forward_operations(length),
    )


def _stages(
    params: Params,
    teacher: Shape,
    student: Shape,
    extent: Extent,
    rates: Rates,
    cache_bytes: float,
    dtype: str,
    sharing: Sharing,
) -> tuple[StagePlan, ...]:
    """Plan the stages in the order of `dvc repro`."""
    from_gguf = params.teacher.source in ("wheel", "gguf")
    folder = teacher.weight_bytes(4 if from_gguf else 2)  # dequantised, or as published
    length, gate = extent.row_length, extent.row_length * _gate_rows(params, extent)
    alone, groups = params.advise.devices, _groups(params, sharing)
    run = extent.run_tokens / rates.train + extent.validated_tokens / rates.student
    live = (extent.run_tokens + extent.validated_tokens) / rates.teacher
    distilled = run + (live if params.train.targets == "online" else 0.0)
    # verify and evaluate run one teacher, and students on one device; seconds per token
    judged = groups / rates.judged_teacher + 2.0 * alone / rates.judged_student
    capture = capture_memory(teacher, params, dtype, sharing).total
    checked = with_sizes(params, batch_rows=params.verify.batch_rows)
    checking = capture_memory(teacher, checked, dtype, sharing).total
    judged_dtype, _ = _judged_dtypes(params)  # students keep float32 weights
    judging = evaluation_memory(teacher, student, params, judged_dtype, sharing).total
    training = training_memory(student, params).total
    beside = 0.0
    if params.train.targets == "online":  # each process has a teacher of its own
        live_rows = -(-params.train.batch_rows // params.advise.devices)
        taught = with_sizes(params, batch_rows=live_rows)
        beside = capture_memory(teacher, taught, dtype).total
    saved = 4.0 * student.parameters
    return (
        StagePlan("fetch", folder, None, None),
        StagePlan("corpus", CORPUS_BYTES * extent.tokens, extent.tokens / TOKENIZED, None),
        StagePlan("prepare", cache_bytes, extent.tokens / rates.teacher, capture),
        StagePlan("verify", None, gate / rates.checked * groups, checking),
        StagePlan("train", saved, distilled, training + beside),
        StagePlan("baseline", saved, run, training),
        StagePlan("evaluate", None, extent.held_out_rows * length * judged, judging),
    )


def _gate_rows(params: Params, extent: Extent) -> int:
    """Return how many rows verify runs through the teacher; those of the noise floor run again."""
    verify, rows = params.verify, extent.train_rows + extent.held_out_rows
    wanted = min(verify.batches * verify.batch_rows, rows)
    return wanted + NOISE_COPIES * min(verify.noise_batches * verify.batch_rows, wanted)
