"""Shapes against the models themselves: parameters counted, operations counted by PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config.params import Params
from pipeline.config.source_params import TeacherParams
from pipeline.config.train_params import LoraParams, StudentParams
from pipeline.errors import DecantError, ParamsError
from pipeline.model.decoder import ModelConfig, StudentModel
from pipeline.model.lora import add_adapters
from pipeline.planning.decoder_shape import Experts, Shape
from pipeline.planning.known_shapes import KNOWN, known
from pipeline.planning.shapes import student_shape, teacher_shape
from tests.helpers import change
from tests.models import small_shape

# Of Qwen2.5 and SmolLM2 the tensors counted in the published safetensors files.
PUBLISHED = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
}


def test_the_table_holds_the_published_counts() -> None:
    assert {name: shape.parameters for name, shape in KNOWN.items()} == PUBLISHED


@pytest.mark.parametrize("name", [name for name in KNOWN if not name.startswith(("Qwen2", "Smol"))])
def test_the_table_holds_the_counts_of_transformers(name: str) -> None:
    """Of its own model with these sizes, built without weights."""
    shape = KNOWN[name]
    sizes = {
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_size,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tied,
    }
    if shape.experts:
        sizes |= {
            "moe_intermediate_size": shape.intermediate_size,
            "num_experts": shape.experts.number,
            "num_experts_per_tok": shape.experts.per_token,
        }
    assert model_of(shape.model_type, **sizes).num_parameters() == shape.parameters


def model_of(model_type: str, **sizes: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))


def test_experts_are_held_all_and_used_a_few() -> None:
    """The published 20.9 B with 3.6 B active, and 30.5 B with 3.3 B, the embedding included."""
    small, qwen = KNOWN["gpt-oss-20b"], KNOWN["Qwen3-30B-A3B"]
    assert small.active_parameters == pytest.approx(3.61e9, rel=2e-3)
    assert qwen.active_parameters + qwen.head == pytest.approx(3.35e9, rel=2e-3)
    assert KNOWN["gpt-oss-120b"].active_parameters == pytest.approx(5.13e9, rel=2e-3)
    dense = KNOWN["Qwen3-8B"]
    assert dense.active_parameters == dense.body_matrices + dense.head


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 100,
    "head_dim": 16,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen3", {"tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True}),
        ("llama", {"attention_bias": True}),
        ("mixtral", EXPERTS),
        ("qwen3_moe", EXPERTS | {"moe_intermediate_size": 24}),
        ("gpt_oss", EXPERTS),
    ],
)
def test_a_config_gives_the_counts_of_its_model(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = model_of(model_type, **SIZES, **changes)
    model.config.save_pretrained(tmp_path)
    _, shape = teacher_shape(of_teacher(source="folder", folder={"path": tmp_path}), tmp_path)
    assert shape.parameters == model.num_parameters()


def test_a_qwen3_without_head_dim_has_heads_as_wide_as_transformers_says(tmp_path: Path) -> None:
    config = SIZES | {"model_type": "qwen3", "head_dim": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, shape = teacher_shape(of_teacher(source="folder"), tmp_path)
    assert shape.head_size == AutoConfig.for_model("qwen3").head_dim == 128


def test_the_language_model_within_a_larger_one_is_read(tmp_path: Path) -> None:
    config = {"text_config": SIZES | {"model_type": "qwen3"}, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, shape = teacher_shape(of_teacher(source="folder"), tmp_path)
    assert (shape.query_size, shape.qk_norm, shape.tied) == (64, True, True)


def test_what_cannot_be_counted_is_refused(tmp_path: Path) -> None:
    for key, value, what in (
        ("kv_lora_rank", 512, "latent attention"),
        ("n_shared_experts", 1, "experts beside shared ones"),
        ("layer_types", ["linear_attention", "full_attention"], "linear attention"),
        ("decoder_sparse_step", 2, "dense layers between"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(SIZES | {key: value}))
        with pytest.raises(DecantError, match=f"is of a model with {what}"):
            teacher_shape(of_teacher(source="folder"), tmp_path)


def test_experts_operations_are_those_that_pytorch_counts() -> None:
    """Of the experts' own loop, in which each computes the tokens that chose it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("mixtral", **SIZES, **EXPERTS)
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    shape = Shape(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_size=16,
        intermediate_size=48,
        vocab_size=100,
        tied=False,
        qkv_bias=False,
        experts=Experts(number=4, per_token=2),
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, 100, (2, 16)), use_cache=False)
    assert counter.get_total_flops() == 2 * 16 * shape.forward_operations(16)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("qwen3", [{}, {"head_dim": 12, "qk_norm": True}])
def test_parameters_are_those_of_the_model(tied: bool, bias: bool, qwen3: dict[str, Any]) -> None:
    shape, model = small_shape(tie_embeddings=tied, attention_bias=bias, **qwen3)
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
            {"init": "random", "vocab_size": 151_936, "head_dim": 64},
            {"init": "checkpoint", "checkpoint": "models/Qwen2.5-Coder-0.5B-Instruct"},
        )
    ]
    some, random, checkpoint = (student_shape(start, teacher)[1] for start in starts)
    assert (some.num_layers, some.hidden_size) == (2, 576)
    with torch.device("meta"):
        assert random.parameters == StudentModel(ModelConfig()).count_parameters()
    qwen3 = {"head_dim": 96, "qk_norm": True, "attention_bias": False}
    wider = change(tiny_params, student={"init": "random", "vocab_size": 151_936, **qwen3}).student
    with torch.device("meta"):
        model = StudentModel(ModelConfig(**qwen3))  # type: ignore[arg-type]
    assert student_shape(wider, teacher)[1].parameters == model.count_parameters()
    assert checkpoint == KNOWN["Qwen2.5-0.5B"]
    assert known("gpt2") is None
