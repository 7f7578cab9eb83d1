"""Shapes against the models themselves: parameters counted, operations counted by PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from pipeline.config.params import Params
from pipeline.config.source_params import TeacherParams
from pipeline.config.train_params import LoraParams, StudentParams
from pipeline.errors import DecantError, ParamsError
from pipeline.model.decoder import ModelConfig, StudentModel
from pipeline.model.lora import add_adapters
from pipeline.planning.shapes import KNOWN, Shape, known, student_shape, teacher_shape
from tests.helpers import change
from tests.models import small_shape

# Tensors counted in the published safetensors files.
PUBLISHED = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
}


def test_the_table_holds_the_published_counts() -> None:
    assert {name: shape.parameters for name, shape in KNOWN.items()} == PUBLISHED


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_are_those_of_the_model(tied: bool, bias: bool) -> None:
    shape, model = small_shape(tie_embeddings=tied, attention_bias=bias)
    assert shape.parameters == model.count_parameters()


def test_adapters_are_those_of_the_library() -> None:
    shape, model = small_shape()
    names = ("q_proj", "k_proj", "o_proj", "gate_proj", "down_proj")
    lora = LoraParams(rank=3, alpha=6.0, dropout=0.0, targets=names)
    add_adapters(model, lora)
    assert shape.lora_parameters(lora) == model.count_parameters(trained_only=True)


def test_operations_are_those_that_pytorch_counts() -> None:
    shape, model = small_shape()
    length = 16
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.randint(0, 300, (2, length)))
    assert counter.get_total_flops() == 2 * length * shape.forward_operations(length)


def test_operations_worked_by_hand() -> None:
    """1 layer, D = 4, A = 4, G = 2, F = 8, V = 10: 4*4*2 + 4*2*2 + 3*4*8 = 144 weights."""
    shape = Shape(
        hidden_size=4,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_size=2,
        intermediate_size=8,
        vocab_size=10,
        tied=True,
        qkv_bias=True,
    )
    assert shape.body_matrices == 144
    assert shape.body_operations(5) == 2 * 144 + 4 * 4 * 5
    assert shape.forward_operations(5) == 368 + 2 * 40
    assert shape.parameters == 144 + (4 + 2 + 2) + 2 * 4 + 4 + 40


def of_teacher(**changes: Any) -> TeacherParams:
    sources = {
        "wheel": {
            "requirement": "x==1",
            "member": "m/SmolLM2-135M-Instruct.Q4_1.gguf",
            "sha256": "0",
        },
        "gguf": {"path": "models/Qwen2.5-Coder-7B-Instruct-Q8_0.gguf", "sha256": None},
        "folder": {"path": "models/absent"},
        "hub": {"id": "Qwen/Qwen2.5-Coder-7B", "revision": "main"},
    }
    return TeacherParams.model_validate(sources | changes)


@pytest.mark.parametrize(
    ("source", "name"), [("wheel", "SmolLM2-135M"), ("gguf", "Qwen2.5-7B"), ("hub", "Qwen2.5-7B")]
)
def test_a_teacher_that_is_not_here_is_looked_up(source: str, name: str, tmp_path: Path) -> None:
    assert teacher_shape(of_teacher(source=source), tmp_path)[1] == KNOWN[name]


def test_a_folder_at_hand_comes_before_the_table(teacher_folder: Path) -> None:
    _, shape = teacher_shape(of_teacher(source="hub"), teacher_folder)
    model = AutoModelForCausalLM.from_pretrained(teacher_folder)
    assert shape.parameters == model.num_parameters()


def test_a_shape_that_is_not_to_be_had_is_one_sentence(
    tmp_path: Path, tiny_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ParamsError, match=r"teacher absent is not known .*stages/fetch\.py"):
        teacher_shape(of_teacher(source="folder"), tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_network)
    hub = {"id": "nobody/nothing", "revision": "main"}
    with pytest.raises(ParamsError, match="nobody/nothing is not known here"):
        teacher_shape(of_teacher(source="hub", hub=hub), tmp_path)
    (tmp_path / "config.json").write_text('{"n_embd": 768}')
    with pytest.raises(DecantError, match=r"does not give the shape of a decoder \(KeyError"):
        teacher_shape(of_teacher(source="hub"), tmp_path)
    (tmp_path / "config.json").write_text("[768]")
    with pytest.raises(DecantError, match="must hold a JSON object"):
        teacher_shape(of_teacher(source="hub"), tmp_path)
    student = change(tiny_params, student={"init": "checkpoint", "checkpoint": "x/y"}).student
    with pytest.raises(ParamsError, match=r"student\.checkpoint=x/y is not known here"):
        student_shape(student, KNOWN["Qwen2.5-7B"])


def no_network(*_: object, **__: object) -> str:
    raise OSError("offline")


def test_the_hub_is_asked_for_what_the_table_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 500,
        "head_dim": 32,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    asked: list[tuple[str, ...]] = []

    def download(hub_id: str, file: str, *, revision: str) -> str:
        asked.append((hub_id, file, revision))
        return str(tmp_path / "config.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    hub = {"id": "someone/model", "revision": "abc"}
    _, shape = teacher_shape(of_teacher(source="hub", hub=hub), tmp_path / "absent")
    assert asked == [("someone/model", "config.json", "abc")]
    assert (shape.num_layers, shape.query_size, shape.kv_size) == (3, 128, 128)


def test_the_three_starts_of_a_student(tiny_params: Params) -> None:
    teacher = KNOWN["SmolLM2-135M"]
    starts: list[StudentParams] = [
        change(tiny_params, student=values).student
        for values in (
            {"init": "layers", "layers": [0, 5]},
            {"init": "random", "vocab_size": 151_936},
            {"init": "checkpoint", "checkpoint": "models/Qwen2.5-Coder-0.5B-Instruct"},
        )
    ]
    some, random, checkpoint = (student_shape(start, teacher)[1] for start in starts)
    assert (some.num_layers, some.hidden_size) == (2, 576)
    with torch.device("meta"):
        assert random.parameters == StudentModel(ModelConfig()).count_parameters()
    assert checkpoint == KNOWN["Qwen2.5-0.5B"]
    assert known("gpt2") is None
