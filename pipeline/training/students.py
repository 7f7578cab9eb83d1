"""The student of a run: its starting weights, vocabulary and adapters, and the saved result.

    random       the architecture in params.yaml with randomly initialised weights
    layers       selected decoder layers of the teacher
    checkpoint   a folder with any causal language model

The saved model is plain in each case (adapters are merged), so later stages need not know which.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config.params import Params
from pipeline.config.train_params import StudentParams
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.vocabulary import require_shared_ids, tokenizer_folder
from pipeline.errors import ParamsError
from pipeline.model.decoder import ModelConfig, StudentModel
from pipeline.model.folder import teacher_folder
from pipeline.model.huggingface import HuggingFaceStudent
from pipeline.model.lora import add_adapters, merge_adapters, save_adapters
from pipeline.model.student import Student
from pipeline.model.weights import open_student, require_saveable, save_student
from pipeline.runtime.console import say


def start_folder(params: StudentParams, teacher: Path) -> Path | None:
    """Return the folder that the student's first weights come from, or None for random weights.

    Raises:
        ParamsError: init=checkpoint without a folder that exists.
    """
    if params.init == "random":
        return None
    if params.init == "layers":
        return teacher
    if params.checkpoint is None:
        raise ParamsError("student.init=checkpoint needs student.checkpoint, a model folder")
    if not params.checkpoint.is_dir():
        raise ParamsError(
            f"student.checkpoint={params.checkpoint} is not a folder: if it is a model's name on "
            f"the hub, download it by `hf download {params.checkpoint} --local-dir FOLDER`, and "
            "name that folder"
        )
    return params.checkpoint


def build_student(params: StudentParams, teacher: Path) -> Student:
    """Return the student at its start, all weights trainable (`RunStudent` adds adapters)."""
    start = start_folder(params, teacher)
    if start is None:
        # pipeline/config/resolved.py has made them numbers.
        assert params.vocab_size != "auto"
        assert params.head_dim != "auto"
        shape = params.model_dump(exclude={"init", "checkpoint", "layers", "lora"})
        return StudentModel(ModelConfig(**shape))
    student = open_student(start, params.layers if params.init == "layers" else None)
    if isinstance(student, HuggingFaceStudent):
        kind = student.model.config.model_type
        say(f"student: transformers runs {start}, a {kind} model")
    return student


class RunStudent:
    """The student of one run, from its start to the saved model.

    Args:
        corpora: the splits that the student will see, the training split first.

    Raises:
        DecantError: the tokenizer is a link to outside its folder, or transformers would not open
            that tokenizer with such a model.
        ParamsError, MismatchError: the student cannot take the corpus's rows or does not share its
            ids, or paths.teacher holds another tokenizer than the corpus's, and the model would be
            saved with it.
    """

    def __init__(self, params: Params, *corpora: CorpusSplit) -> None:
        self._params = params.student
        teacher = teacher_folder(params.paths.teacher)  # a cached run does not need it
        self._start = start_folder(params.student, teacher)
        if self._start is not None:
            require_shared_ids(self._start, corpora, teacher)
        self._tokenizer = tokenizer_folder((teacher, self._start), corpora[0])
        self.model = build_student(params.student, teacher)
        require_room(self.model, corpora[0])
        if self._tokenizer is not None:
            require_saveable(self.model, self._tokenizer)
        self._adapters: Any = None
        if params.student.lora is not None:
            self._adapters = add_adapters(self.model, params.student.lora)

    def save(self, run: Path) -> None:
        """Write <run>/model, and first <run>/adapter if there is a folder to apply it to.

        This merges the adapters; the student no longer has any afterwards.
        """
        if self._adapters is not None:
            if self._params.init == "checkpoint" and self._start is not None:
                save_adapters(self._adapters, run / "adapter", start=self._start)
            merge_adapters(self._adapters)
        save_student(self.model, run / "model", tokenizer_from=self._tokenizer)


def require_room(student: Student, corpus: CorpusSplit) -> None:
    """Refuse a student with fewer rows than ids, or whose context is shorter than a row.

    Vocabularies are matched by shared ids, from 0 to the tokenizer's largest. The number of
    embedding rows may differ between teacher and student (Qwen2.5: 151,936 or 152,064 rows, 151,665
    tokenizer ids): rows beyond the tokenizer never occur, are left out of the teacher's sums, and
    count as ids without teacher mass for the student. A student with fewer rows than the tokenizer
    has ids cannot even embed the text.
    """
    if student.vocab_size < corpus.info.vocab_size:
        raise ParamsError(
            f"the student has {student.vocab_size} vocabulary rows, the corpus uses a tokenizer of "
            f"{corpus.info.vocab_size} ids: set student.vocab_size to at least that, or start from "
            "a model of the teacher's family"
        )
    if student.max_seq_len is not None and student.max_seq_len < corpus.info.row_length:
        raise ParamsError(
            f"the student's max_seq_len={student.max_seq_len} is less than the corpus's row length "
            f"{corpus.info.row_length}: enlarge it, or shorten corpus.row_length"
        )
