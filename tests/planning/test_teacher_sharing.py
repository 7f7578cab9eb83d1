"""Teachers that devices share: by whom and how, memory and times worked by hand, sentences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config.params import Params
from pipeline.errors import ParamsError
from pipeline.planning.costs import capture_memory, evaluation_memory
from pipeline.planning.decoder_shape import Shape
from pipeline.planning.known_shapes import KNOWN
from pipeline.planning.plan import Plan, make_plan
from pipeline.planning.plan_text import plan_lines
from pipeline.planning.shapes import teacher_shape
from pipeline.planning.teacher_sharing import ALONE, Sharing, share_teacher
from pipeline.teacher.sharded import choose_parallel
from tests.helpers import change
from tests.planning.test_shapes import SIZES, of_teacher

QWEN = KNOWN["Qwen3-32B"]


def sharing_of(teacher: Shape, params: Params, number: int, wanted: str = "auto") -> Sharing:
    params = change(params, advise={"devices": number}, prepare={"parallel": wanted})
    return share_teacher(teacher, params, fits_alone=False)


def test_a_teacher_is_divided_as_prepare_divides_it(tiny_params: Params, tmp_path: Path) -> None:
    """4 heads and 2 key/value heads divide by 2, and not by 3."""
    for model_type in ("llama", "qwen3"):
        folder = tmp_path / model_type
        config = AutoConfig.for_model(model_type, **SIZES)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        _, shape = teacher_shape(of_teacher(source="hub"), folder)
        for number, expected in ((2, "tensor"), (3, "fsdp")):
            for wanted in ("auto", "fsdp"):
                real = choose_parallel(folder, wanted, number)
                assert sharing_of(shape, tiny_params, number, wanted) == Sharing(number, real)
            assert choose_parallel(folder, "auto", number) == expected


def test_what_transformers_has_no_plan_for_is_not_divided_by_heads(tiny_params: Params) -> None:
    """gpt-oss has a plan for its head alone."""
    plain = replace(KNOWN["gpt-oss-20b"], weight_format=None)
    assert sharing_of(plain, tiny_params, 4) == Sharing(4, "fsdp")
    assert sharing_of(KNOWN["Qwen3-30B-A3B"], tiny_params, 4) == Sharing(4, "tensor")
    unknown = replace(QWEN, model_type="of another library")
    assert sharing_of(unknown, tiny_params, 4) == Sharing(4, "fsdp")
    assert sharing_of(unknown, tiny_params, 4, "tensor") == Sharing(4, "tensor")
    assert sharing_of(QWEN, tiny_params, 1) == ALONE


def test_quantised_weights_are_divided_by_vllm_alone(tiny_params: Params) -> None:
    quantised = KNOWN["gpt-oss-20b"]
    assert sharing_of(quantised, tiny_params, 4) == ALONE
    options = {"engine": "vllm", "vllm": {"options": {"tensor_parallel_size": 4}}}
    by_vllm = change(tiny_params, prepare=options)
    assert sharing_of(quantised, by_vllm, 8) == Sharing(4, "vllm")
    assert Sharing(4, "vllm").speedup(1) == 4
    with pytest.raises(ParamsError, match=r"take 4 devices, and advise\.devices=2: raise that"):
        sharing_of(quantised, by_vllm, 2)


def test_rows_that_leave_devices_idle_do_not_speed_up() -> None:
    assert [Sharing(4, "fsdp").speedup(rows) for rows in (1, 4, 6, 8)] == [1, 4, 3, 4]
    assert Sharing(4, "tensor").speedup(1) == 4
    assert ALONE.speedup(3) == 1


def test_memory_of_the_first_device_worked_by_hand(tiny_params: Params) -> None:
    params = change(tiny_params, capture={"batch_rows": 6})
    alone = capture_memory(QWEN, params, "bfloat16")
    tensor = capture_memory(QWEN, params, "bfloat16", Sharing(4, "tensor"))
    head = 2 * QWEN.head
    assert tensor.weights == alone.weights / 4 + head
    assert tensor.activations == 6 * 32 * (2 * (4 * 5120 + 3 * 25_600 / 4) + 32)
    assert tensor.logits == alone.logits
    fsdp = capture_memory(QWEN, params, "bfloat16", Sharing(4, "fsdp"))
    block = (alone.weights - 2 * head) / 64
    assert fsdp.weights == pytest.approx(alone.weights / 4 + 3 * head + 2 * block)
    rows = 2  # of the 6, and the states of all
    assert fsdp.activations == rows * 32 * (2 * (4 * 5120 + 3 * 25_600) + 32) + 4 * 6 * 32 * 5120
    student = KNOWN["Qwen3-1.7B"]
    both = evaluation_memory(QWEN, student, params, "bfloat16", Sharing(4, "tensor"))
    assert both.weights == tensor.weights + 8 * student.parameters


def planned(params: Params, tmp_path: Path, **sections: dict[str, object]) -> tuple[Plan, str]:
    """A plan for Qwen3-32B on four cards of 24 GB, and its text."""
    changes: dict[str, dict[str, object]] = {
        "teacher": {"source": "hub", "hub": {"id": "Qwen/Qwen3-32B", "revision": "main"}},
        "paths": {"teacher": str(tmp_path)},
        "advise": {"device": "rtx4090", "devices": 4, "mfu": 0.5},
        "prepare": {"dtype": "bfloat16"},
        "evaluate": {"dtype": "bfloat16"},
    }
    for name, section in sections.items():
        changes[name] = changes.get(name, {}) | section
    params = change(params, **changes)  # type: ignore[arg-type]
    plan = make_plan(params)
    return plan, " ".join(" ".join(plan_lines(plan, params)).split())


def test_a_shared_teacher_is_planned_as_one(tiny_params: Params, tmp_path: Path) -> None:
    plan, text = planned(tiny_params, tmp_path)
    assert plan.sharing == Sharing(4, "tensor")
    line = "prepare, verify and evaluate: 4 devices share one teacher"
    assert f"{line} (torchrun --nproc-per-node 4, tensor)" in text
    assert "prepare fits: 1" in text  # 18 or 19 GB
    assert "evaluate fits" not in text
    assert "cannot have a live teacher" in text
    assert "caching pays" not in text
    rate = 0.5 * 165.2e12
    seconds = (QWEN.body_operations(32) / 4 + 2 * QWEN.head) / rate
    assert plan.rates.teacher == pytest.approx(1 / seconds)
    rows = plan.extent.train_rows + plan.extent.held_out_rows
    assert plan.stage("prepare").seconds == pytest.approx(rows * 32 * seconds)
    verify, prepare = plan.stage("verify"), plan.stage("prepare")
    assert verify.memory is not None
    assert prepare.memory is not None
    assert 0.99 * prepare.memory < verify.memory < prepare.memory  # fewer rows at once
    student = 2 * plan.student_shape.forward_operations(32) / rate  # on one device
    judged = plan.extent.held_out_rows * 32 * (seconds + student)
    assert plan.stage("evaluate").seconds == pytest.approx(judged)


def test_one_row_keeps_one_device_of_fsdp_at_work(tiny_params: Params, tmp_path: Path) -> None:
    sections: dict[str, dict[str, object]] = {
        "prepare": {"parallel": "fsdp"},
        "capture": {"batch_rows": 4},
        "verify": {"batch_rows": 1},
    }
    plan, text = planned(tiny_params, tmp_path, **sections)
    assert "(torchrun --nproc-per-node 4, fsdp)" in text
    one, four = QWEN.forward_operations(32), QWEN.body_operations(32) / 4 + 2 * QWEN.head
    assert plan.rates.teacher / plan.rates.checked == pytest.approx(one / four)


def test_a_teacher_that_fits_is_not_shared(tiny_params: Params, tmp_path: Path) -> None:
    plan, text = planned(tiny_params, tmp_path, advise={"device": "h200"})
    assert plan.sharing == ALONE
    assert "share one teacher" not in text
    assert "caching pays" in text
    rate = 0.5 * 989e12
    assert plan.rates.teacher == pytest.approx(4 * rate / QWEN.forward_operations(32))


def test_a_teacher_that_fits_nowhere_is_said_not_to(tiny_params: Params, tmp_path: Path) -> None:
    for devices in (1, 2):
        _, text = planned(tiny_params, tmp_path, advise={"devices": devices})
        assert "prepare does NOT fit: " in text
        assert "or more of them (advise.devices)" in text
        assert ("2 devices share one teacher" in text) == (devices == 2)
    plan, text = planned(tiny_params, tmp_path, train={"targets": "online"})
    whole = plan.teacher_shape.weight_bytes(2)
    assert (plan.stage("train").memory or 0) > whole  # each process has a teacher of its own
    assert "train does NOT fit" in text


def test_a_quantised_teacher_is_told(tiny_params: Params, tmp_path: Path) -> None:
    hub = {"id": "Qwen/Qwen3-32B-FP8", "revision": "main"}
    sections: dict[str, dict[str, object]] = {
        "teacher": {"hub": hub},
        "advise": {"device": "h100", "devices": 1},
    }
    plan, text = planned(tiny_params, tmp_path, **sections)
    assert "32,762 M parameters, linear layers fp8 at 8 bits, in bfloat16" in text
    assert "prepare fits: 3" in text
    assert plan.stage("fetch").written == pytest.approx(QWEN.linear_matrices, rel=0.11)
    assert "has no kernels" not in text
    assert plan.student_shape.weight_format is None  # layers of the teacher
    sections["advise"] = {"device": "a100-80gb", "devices": 1}
    _, text = planned(tiny_params, tmp_path, **sections)
    assert "a100-80gb has no kernels for fp8: transformers needs a GPU of compute" in text
    plan, text = planned(tiny_params, tmp_path, **sections, prepare={"dequantize": True})
    assert "has no kernels" not in text
    assert (plan.stage("prepare").memory or 0) > 2 * QWEN.parameters
    assert (plan.stage("fetch").written or 0) < 1.2 * QWEN.parameters
