"""Teachers and students whose language model is a part of a larger one, or whose logits change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pipeline.config.params import Params
from pipeline.data.corpus import build_corpus
from pipeline.errors import DecantError
from pipeline.export.to_huggingface import write_huggingface
from pipeline.model.config_json import describe
from pipeline.model.huggingface import HuggingFaceStudent
from pipeline.model.weights import open_student
from pipeline.planning.shapes import teacher_shape
from pipeline.teacher.fetch import fetch_teacher
from pipeline.teacher.transformers import HuggingFaceTeacher
from pipeline.training.run import run_training
from tests.helpers import SMALL, capture_all, change, from_folder, gate
from tests.model.architectures import FAMILIES
from tests.models import VOCABULARY_ROWS, make_tokenizer

LARGER = ["qwen2_5_vl", "qwen3_vl", "mistral3", "gemma3", "llama4"]


def make_folder(folder: Path, kind: str) -> Path:
    """A tiny random model of the family, with the tests' tokenizer."""
    torch.manual_seed(0)
    values = dict(FAMILIES[kind][1])
    sizes = {"vocab_size": VOCABULARY_ROWS, "max_position_embeddings": 128}
    if "text_config" in values:
        values["text_config"] = values["text_config"] | sizes
    else:
        values |= sizes
    config = CONFIG_MAPPING[kind](**values)
    larger = type(config) in AutoModelForImageTextToText._model_mapping
    auto = AutoModelForImageTextToText if larger else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def with_teacher(params: Params, folder: Path) -> Params:
    return change(
        params,
        teacher={"source": "folder", "folder": {"path": str(folder)}},
        paths={"teacher": str(folder)},
        student=SMALL | {"init": "random", "vocab_size": 320},
    )


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma2"])
def test_from_folder_to_trained_student(kind: str, tiny_params: Params, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", kind)
    params = with_teacher(tiny_params, folder)
    assert fetch_teacher(params.teacher, tmp_path / "pointer") == folder
    assert describe(folder).startswith(f"{kind}, 2 layers, hidden 32, 320 vocabulary rows")
    assert teacher_shape(params.teacher, params.paths.teacher)[1].num_layers == 2
    build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    capture_all(params)
    assert gate(params).passed
    run_training(params, "random")
    own = from_folder(params, folder)
    run_training(own, "own")
    run = params.paths.runs / "own" / "model"
    write_huggingface(run, tmp_path / "exported", torch.float32)
    tokens = torch.arange(3, 20)[None]
    one, two = (open_student(f).eval() for f in (run, tmp_path / "exported"))
    assert torch.equal(one.hidden_states(tokens), two.hidden_states(tokens))


@pytest.mark.parametrize("kind", LARGER)
def test_only_the_language_model_is_held(kind: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", kind)
    teacher = HuggingFaceTeacher(
        folder, vocab_size=300, dtype=torch.float32, device=torch.device("cpu")
    )
    names = {name for name, _ in teacher.model.named_parameters()}
    assert not [name for name in names if "vision" in name or "visual" in name]
    assert f"a {teacher.model.config.model_type} of" in teacher.describe()


@pytest.mark.parametrize("kind", LARGER)
def test_only_the_language_model_is_trained(kind: str, tmp_path: Path) -> None:
    student = HuggingFaceStudent(make_folder(tmp_path / "model", kind))
    tokens = torch.arange(3, 20)[None]
    (student.hidden_states(tokens) @ student.head_weight.T).logsumexp(-1).sum().backward()
    trained: dict[str, Any] = {n: p for n, p in student.named_parameters() if p.requires_grad}
    assert not [n for n in trained if "vision" in n or "visual" in n or "projector" in n]
    assert not [n for n, p in trained.items() if p.grad is None]


def test_what_transformers_cannot_open_is_one_sentence(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "qwen2_5_vl")
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DecantError, match="model"):
        HuggingFaceTeacher(folder, vocab_size=300, dtype=torch.float32, device=torch.device("cpu"))
