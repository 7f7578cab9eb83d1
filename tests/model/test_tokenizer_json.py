"""Tokens are those of tokenizer.json, whatever class other files of a folder name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import DecantError
from pipeline.model.decoder import ModelConfig, StudentModel
from pipeline.model.huggingface import HuggingFaceStudent
from pipeline.model.tokenizer import LARGEST_ID, TokenizerClassError, load_tokenizer
from pipeline.model.weights import load_student, read_config, require_saveable, save_student
from tests.helpers import SMALL
from tests.models import (
    make_digit_tokenizer,
    make_model,
    make_qwen_tokenizer,
    make_tokenizer,
    text_of_many_lines,
)


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def true_ids(folder: Path, text: str) -> list[int]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as SmolLM2's, which Qwen2's class splits otherwise."""
    folder = tmp_path_factory.mktemp("digits")
    make_digit_tokenizer(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("name", [None, "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_class_that_other_files_name_splits_nothing(
    kind: str, name: str | None, digits: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(digits, tmp_path / "model")
    edit(folder / "tokenizer_config.json", tokenizer_class=name)
    edit(folder / "config.json", model_type=kind)
    text = text_of_many_lines()
    tokenizer = load_tokenizer(folder)
    assert ids_of(tokenizer, text) == true_ids(digits, text)
    assert tokenizer.eos_token == "<|endoftext|>"  # which tokenizer_config.json says
    if kind == "qwen2":  # or the test shows nothing
        assert ids_of(AutoTokenizer.from_pretrained(folder), text) != true_ids(digits, text)


def test_a_random_students_folder_opens_with_the_corpus_tokenizer(
    digits: Path, tmp_path: Path
) -> None:
    """With a bias it would be a qwen2, beside which transformers puts Qwen2's own tokenizer."""
    student = StudentModel(ModelConfig(**(SMALL | {"vocab_size": 320})))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    folder = tmp_path / "model"
    require_saveable(student, digits)
    save_student(student, folder, tokenizer_from=digits)
    text = text_of_many_lines()
    assert ids_of(AutoTokenizer.from_pretrained(folder), text) == true_ids(digits, text)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    tokens = torch.randint(0, 320, (2, 20))
    expected = student.eval()(tokens)
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(theirs.eval()(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    assert read_config(folder) == student.config
    assert torch.equal(load_student(folder).eval()(tokens), expected)


def test_a_student_with_qwens_tokenizer_stays_a_qwen2(tmp_path: Path) -> None:
    make_qwen_tokenizer(tmp_path / "qwen")
    student = StudentModel(ModelConfig(**(SMALL | {"vocab_size": 352})))
    save_student(student, tmp_path / "model", tokenizer_from=tmp_path / "qwen")
    assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == "qwen2"
    text = text_of_many_lines()
    found = ids_of(AutoTokenizer.from_pretrained(tmp_path / "model"), text)
    assert found == true_ids(tmp_path / "qwen", text)


def test_the_class_of_the_teachers_folder_does_not_reach_the_student(
    digits: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(digits, tmp_path / "teacher")
    edit(source / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    plain = ModelConfig(**(SMALL | {"vocab_size": 320, "attention_bias": False}))
    save_student(StudentModel(plain), tmp_path / "model", tokenizer_from=source)
    text = text_of_many_lines()
    found = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert ids_of(found, text) == true_ids(digits, text)
    assert found.eos_token == "<|endoftext|>"


def test_a_type_that_keeps_no_other_tokenizer_is_refused_before_training(
    digits: Path, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "start", "qwen2", num_hidden_layers=1)
    student = HuggingFaceStudent(folder)
    with pytest.raises(TokenizerClassError, match=r"a 'qwen2' model as Qwen2Tokenizer") as caught:
        require_saveable(student, digits)
    assert "\n" not in str(caught.value)
    require_saveable(student, folder)


def test_a_llama_whose_fourth_bias_is_not_zero_is_not_ours(digits: Path, tmp_path: Path) -> None:
    student = StudentModel(ModelConfig(**(SMALL | {"vocab_size": 320})))
    save_student(student, tmp_path / "model", tokenizer_from=digits)
    edit(tmp_path / "model/config.json", attention_out_bias=True)
    with pytest.raises(DecantError, match="attention_bias=True, for o_proj too"):
        load_student(tmp_path / "model")


def damage(folder: Path, kind: str) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    if kind == "id":
        content["model"]["vocab"]["zzz"] = LARGEST_ID
        file.write_text(json.dumps(content))
    elif kind == "pipe":
        file.unlink()
        os.mkfifo(file)
    elif kind == "nested":
        file.write_text("[" * 100_000)
    else:
        file.write_text(json.dumps(content)[:-100])


@pytest.mark.parametrize("kind", ["id", "pipe", "nested", "short"])
def test_damage_is_one_sentence(kind: str, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    damage(tmp_path, kind)
    with pytest.raises(DecantError, match=str(tmp_path)) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
