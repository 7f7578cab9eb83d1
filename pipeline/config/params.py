"""The typed form of params.yaml: one frozen section per stage, every value checked when read.

The sections are in source_params.py, cache_params.py, train_params.py and delivery_params.py. Their
defaults are the demo's values: a params file holds what differs from them. An unknown key is an
error. DVC compares values of params.yaml alone and cannot know defaults, so a file must hold every
key when DVC runs the stage; the repository's params.yaml does (`python -m stages.show_params`).
`--set key=value` takes the syntax of `dvc exp run -S` and is parsed by the same library (Hydra's
override grammar), so a recipe works in both.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, get_args, get_origin

from pydantic import Field, PlainValidator, ValidationError, ValidationInfo, field_validator

from pipeline.config.cache_params import AdviseParams, CaptureParams, PrepareParams, VerifyParams
from pipeline.config.delivery_params import (
    EvaluateParams,
    ExportParams,
    GenerateParams,
    HumanevalParams,
    StudyParams,
)
from pipeline.config.params_file import read_params_file
from pipeline.config.section import Location, LocationOrHub, Section
from pipeline.config.source_params import CorpusParams, RolloutsParams, TeacherParams
from pipeline.config.train_params import RunParams, StudentParams, TrainParams
from pipeline.errors import ParamsError, shortened
from pipeline.io.address import Address, in_repository


class Paths(Section):
    """The places where the stages write, relative to the working folder."""

    inputs: Path = Path("cache/inputs")
    """Hashes of what teacher.* and corpus.* name, for DVC."""
    teacher: Path = Path("cache/teacher")
    """Hugging Face folder of the teacher with its tokenizer, or a pointer to one."""
    corpus: LocationOrHub = Path("cache/corpus.zarr")
    """Zarr group of tokens and document ids; a path, s3://bucket/prefix or gs://bucket/prefix, or
    hf://datasets/ORG/NAME@REVISION to read one that `share` published."""
    rollouts: Path = Path("cache/rollouts")
    """Rollouts: a journal of them, and corpus.zarr, the corpus that they make."""
    advise: Path = Path("cache/advise")
    """What each K would keep and cost, measured on a sample."""
    logits: LocationOrHub = Path("cache/logits.zarr")
    """The cache, a zarr group of the teacher's top-K; also s3:// or gs://, or hf:// as above."""
    verify: Path = Path("cache/verify")
    """Metrics and histogram of the gate."""
    runs: Path = Path("cache/runs")
    """One folder per training run."""
    checkpoints: Location | None = None
    """Checkpoints of unfinished runs, also s3:// or gs://; null: in the run's folder."""
    evaluate: Path = Path("cache/evaluate")
    """Metrics, calibration and samples."""
    humaneval: Path = Path("cache/humaneval")
    """HumanEval: one folder of programs per model, and metrics."""
    export: Path = Path("cache/export")
    """One folder per published model, and the result of its check."""
    report: Path = Path("cache/report")
    """The HTML page."""
    study: Path = Path("cache/study")
    """What a model is made of: report, metrics and tensors."""

    @field_validator("corpus", "logits")
    @classmethod
    def _in_repository(cls, address: Address, info: ValidationInfo) -> Address:
        """Find corpus and cache in a repository that is named as a whole."""
        return in_repository(address, str(info.field_name))


def _device(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        return value
    raise ValueError("it must be auto, cpu, cuda or cuda:N, for example cuda:1")


class Params(Section):
    """All parameters of the pipeline."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of sampled ids, initial weights, order of rows and generated text."""
    device: Annotated[str, PlainValidator(_device)] = "auto"
    """Where models run: cpu, cuda, cuda:N for GPU N (from 0), or auto, a GPU if there is one."""
    paths: Paths = Paths()
    teacher: TeacherParams = TeacherParams()
    corpus: CorpusParams = CorpusParams()
    rollouts: RolloutsParams = RolloutsParams()
    advise: AdviseParams = AdviseParams()
    prepare: PrepareParams = PrepareParams()
    capture: CaptureParams = CaptureParams()
    verify: VerifyParams = VerifyParams()
    student: StudentParams = StudentParams()
    train: TrainParams = TrainParams()
    run: RunParams = RunParams()
    evaluate: EvaluateParams = EvaluateParams()
    humaneval: HumanevalParams = HumanevalParams()
    export: ExportParams = ExportParams()
    generate: GenerateParams = GenerateParams()
    study: StudyParams = StudyParams()


def load_params(file: Path, overrides: Sequence[str] = (), *, complete: bool = False) -> Params:
    """Read a params file, apply `key=value` overrides, and check everything.

    Args:
        file: YAML; keys that it leaves out have their defaults.
        overrides: changes to what the file says.
        complete: refuse a file that leaves out keys.

    Raises:
        ParamsError: a value is refused; the message is one sentence that names the key.
    """
    values = read_params_file(file, overrides)
    try:
        params = Params.model_validate(values)
    except ValidationError as error:
        raise ParamsError(f"{file}: {_sentence(error)}") from None
    if complete and (missing := list(_defaults_taken(params))):
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ParamsError(
            f"{file} leaves out {missing[0]}{more}, whose changes DVC would not see: complete it "
            f"by `python -m stages.show_params --params {file} --output {file}`"
        )
    return params


def _defaults_taken(section: Section, prefix: str = "") -> Iterator[str]:
    """List the keys, or whole sections, that a file left out."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if name not in section.model_fields_set:
            yield prefix + name
        elif isinstance(value, Section):
            yield from _defaults_taken(value, f"{prefix}{name}.")


def _sentence(error: ValidationError) -> str:
    """Turn pydantic's first error into a sentence, with the number of further errors."""
    first, *rest = error.errors()
    key = ".".join(str(part)[:60] for part in first["loc"])
    kind = first["type"]
    if kind == "extra_forbidden":
        close = _closest_key(key)
        hint = f"did you mean {close}?" if close else "remove it"
        sentence = f"{key} is not a known key: {hint}"
    else:
        message = first["msg"].removeprefix("Value error, ")
        value = "" if isinstance(first["input"], dict) else f"={shortened(first['input'])}"
        sentence = f"{key}{value} is refused: {message[:1].lower()}{message[1:]}"
    return sentence + (f" (and {len(rest)} more)" if rest else "")


def _closest_key(key: str) -> str | None:
    """Return the key probably meant: one of that name in another section, else any similar one."""
    known = all_keys(Params)
    namesakes = [other for other in known if other.split(".")[-1] == key.split(".")[-1]]
    for candidates in (namesakes, known):
        if close := difflib.get_close_matches(key, candidates, n=1):
            return close[0]
    return None


def all_keys(section: type[Section], prefix: str = "") -> list[str]:
    """Return the paths of all keys of a section and of the sections in it, but not in its lists."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        union = () if get_origin(field.annotation) is tuple else get_args(field.annotation)
        for kind in (field.annotation, *union):  # Section, or Section | None
            if isinstance(kind, type) and issubclass(kind, Section):
                keys += all_keys(kind, f"{prefix}{name}.")
    return keys
