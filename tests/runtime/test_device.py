"""Formats that follow the hardware: CPUs and GPUs of every kind, by what PyTorch says of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.config.params import Params
from pipeline.errors import ParamsError
from pipeline.runtime import device as hardware
from pipeline.runtime.device import (
    compute_dtype,
    has_bfloat16_units,
    inference_dtype,
    pick_device,
    place_rounded,
    training_dtype,
)
from pipeline.runtime.numerics import as_factor, matmul_float32
from pipeline.teacher.transformers import HuggingFaceTeacher
from tests.helpers import ROOT, change, open_cache

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine to be described: `of_cpu` and `of_gpu` say what its hardware has."""
    hardware._cpu_has_bfloat16_units.cache_clear()
    hardware._warn_if_slow.cache_clear()
    monkeypatch.setattr(hardware.platform, "machine", lambda: "x86_64")
    yield monkeypatch
    hardware._cpu_has_bfloat16_units.cache_clear()
    hardware._warn_if_slow.cache_clear()


def of_cpu(patch: pytest.MonkeyPatch, *, onednn: bool, amx: bool, avx512_bf16: bool) -> None:
    patch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)


def of_gpu(patch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    patch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")


@pytest.mark.parametrize(
    ("onednn", "amx", "avx512_bf16", "expected"),
    [
        (True, True, True, BFLOAT16),  # Sapphire Rapids
        (True, False, True, FLOAT32),  # AVX512-BF16 alone was slower on a Xeon
        (True, False, False, FLOAT32),  # Skylake-X: oneDNN supports bfloat16 by emulation
        (False, False, False, FLOAT32),  # AVX2
        (False, True, True, FLOAT32),  # AMX that ONEDNN_MAX_CPU_ISA=AVX2 forbids to use
    ],
)
def test_auto_on_a_cpu_asks_for_units(
    units: pytest.MonkeyPatch,
    onednn: bool,
    amx: bool,
    avx512_bf16: bool,
    expected: torch.dtype,
) -> None:
    of_cpu(units, onednn=onednn, amx=amx, avx512_bf16=avx512_bf16)
    assert inference_dtype("auto", CPU, key="prepare.dtype") == expected
    assert training_dtype("auto", CPU) == expected


def test_auto_on_arm_is_what_onednn_says(units: pytest.MonkeyPatch) -> None:
    of_cpu(units, onednn=True, amx=False, avx512_bf16=False)
    units.setattr(hardware.platform, "machine", lambda: "aarch64")
    assert has_bfloat16_units(CPU)


def test_without_onednn_there_are_no_units(units: pytest.MonkeyPatch) -> None:
    """As on macOS, whose builds of PyTorch have no torch.ops.mkldnn."""
    units.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not has_bfloat16_units(CPU)


@pytest.mark.parametrize(
    ("capability", "training"), [((7, 5), FLOAT16), ((8, 0), BFLOAT16), ((9, 0), BFLOAT16)]
)
def test_auto_on_a_gpu(
    units: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    capability: tuple[int, int],
    training: torch.dtype,
) -> None:
    of_gpu(units, capability)
    assert inference_dtype("auto", GPU, key="prepare.dtype") == FLOAT16
    assert training_dtype("auto", GPU) == training
    said = capsys.readouterr().out
    expected = "train.dtype=auto is float16 here: Some GPU (compute capability 7.5) has no bfloat16"
    assert (expected in said) is (training == FLOAT16)


def test_bfloat16_is_refused_on_a_gpu_that_has_none(units: pytest.MonkeyPatch) -> None:
    of_gpu(units, (7, 5))
    with pytest.raises(ParamsError, match=r"generate\.dtype=bfloat16, but Some GPU .* 7\.5.* set"):
        inference_dtype("bfloat16", GPU, key="generate.dtype")
    with pytest.raises(ParamsError, match=r"train\.dtype=bfloat16, but Some GPU"):
        training_dtype("bfloat16", GPU)
    assert inference_dtype("float16", GPU, key="generate.dtype") == FLOAT16
    assert training_dtype("float16", GPU) == FLOAT16


def test_a_slow_format_is_told_once_with_the_factor(
    units: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of_cpu(units, onednn=False, amx=False, avx512_bf16=False)
    seconds = {FLOAT32: 0.001, BFLOAT16: 0.0072, FLOAT16: 0.05}
    units.setattr(hardware, "_linear_seconds", seconds.__getitem__)
    for _ in range(2):
        assert training_dtype("bfloat16", CPU) == BFLOAT16
    assert capsys.readouterr().out == (
        "warning: train.dtype=bfloat16 takes 7.2 times as long as float32 on this processor, which "
        "has no fast units for it: set train.dtype to auto or float32\n"
    )
    hardware._cpu_has_bfloat16_units.cache_clear()
    of_cpu(units, onednn=True, amx=True, avx512_bf16=True)  # on a busy machine, say
    assert inference_dtype("bfloat16", CPU, key="prepare.dtype") == BFLOAT16
    assert inference_dtype("float16", CPU, key="prepare.dtype") == FLOAT16  # computed in float32
    assert not capsys.readouterr().out
    assert training_dtype("float16", CPU) == FLOAT16  # computed in float16
    assert "train.dtype=float16 takes 50.0 times as long" in capsys.readouterr().out


def test_models_are_named_only_where_their_formats_differ() -> None:
    assert hardware.describe_dtypes({"teacher": FLOAT16, "student": FLOAT16}) == "float16"
    formats = {"teacher": FLOAT16, "student": BFLOAT16, "baseline": BFLOAT16}
    assert hardware.describe_dtypes(formats) == "float16 (teacher), bfloat16 (student, baseline)"


def test_the_factor_is_measured() -> None:
    """Sixteen times as much work takes longer: the clock is about the product."""
    small, large = torch.ones(16, 64), torch.ones(256, 1024)
    fast, slow = (hardware.seconds_of(lambda x=x: x @ x.T, CPU) for x in (small, large))
    assert 0.0 < fast < slow
    assert hardware._linear_seconds(FLOAT32) > 0.0


def test_float16_on_a_cpu_rounds_weights_and_computes_in_float32() -> None:
    assert compute_dtype(FLOAT16, CPU) == FLOAT32
    assert compute_dtype(FLOAT16, GPU) == FLOAT16
    assert compute_dtype(BFLOAT16, CPU) == BFLOAT16
    layer = nn.Linear(3, 2)
    layer.register_buffer("frequencies", torch.tensor([0.1]))
    before = layer.weight.detach().clone()
    weight = place_rounded(layer, FLOAT16, CPU).weight
    assert weight.dtype == FLOAT32
    assert torch.equal(weight, before.half().float())
    assert not torch.equal(weight, before)
    assert torch.equal(layer.frequencies, torch.tensor([0.1]))


def test_weights_that_a_model_keeps_in_float32_are_not_rounded(tmp_path: Path) -> None:
    """ERNIE's routers are float32 in a bfloat16 model; a float16 teacher rounds no more than it."""
    from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig

    config = Ernie4_5_MoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=8,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for dtype, target in ((BFLOAT16, BFLOAT16), (FLOAT16, FLOAT32)):
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        kept = {name for name, p in theirs.named_parameters() if p.dtype == FLOAT32}
        assert any("gate.weight" in name for name in kept)
        expected = {name: p.detach().clone() for name, p in theirs.named_parameters()}
        for name, parameter in place_rounded(theirs, dtype, CPU).named_parameters():
            assert parameter.dtype == (FLOAT32 if name in kept else target)
            assert torch.equal(parameter.float(), expected[name].float())


def test_a_float16_teacher_on_a_cpu(teacher_folder: Path) -> None:
    """Against transformers with the same rounding: weights to float16, products in float32."""
    from transformers import AutoModelForCausalLM

    teacher = HuggingFaceTeacher(teacher_folder, vocab_size=300, dtype=FLOAT16, device=CPU)
    theirs = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=FLOAT16).float().eval()
    tokens = torch.randint(300, (2, 17))
    ours = torch.cat([logits.clone() for _, logits in teacher.logits_by_chunk(tokens)])
    with torch.no_grad():
        expected = theirs(input_ids=tokens).logits.flatten(0, 1)[:, :300]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
@pytest.mark.parametrize("has_units", [True, False])
def test_products_round_factors_alone(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, has_units: bool
) -> None:
    """Against float64 products of rounded factors, with units and (emulated) without."""
    if has_units and not has_bfloat16_units(CPU):
        pytest.skip("this processor has no bfloat16 units")
    monkeypatch.setattr("pipeline.runtime.numerics.has_bfloat16_units", lambda device: has_units)
    a, b = torch.randn(7, 64), torch.randn(64, 11)
    expected = a.to(dtype).double() @ b.to(dtype).double()
    torch.testing.assert_close(matmul_float32(a, b, dtype).double(), expected, atol=2e-5, rtol=1e-5)
    start = torch.randn(7, 11)
    out = matmul_float32(a, b, dtype, add_to=start.clone())
    torch.testing.assert_close(out.double(), start.double() + expected, atol=2e-5, rtol=1e-5)
    into = torch.empty(7, 11)
    assert matmul_float32(a, b, dtype, out=into) is into
    torch.testing.assert_close(into.double(), expected, atol=2e-5, rtol=1e-5)
    factors = as_factor(a, dtype), as_factor(b, dtype)
    assert torch.equal(matmul_float32(*factors, dtype, prepared=True), into)


def test_cuda_that_cannot_be_used_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ParamsError, match=r"device=cuda, but PyTorch .* is a build without CUDA"):
        pick_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ParamsError, match=r"is a CUDA build that finds no GPU or no NVIDIA driver"):
        pick_device("cuda")
    assert pick_device("auto") == CPU


def test_a_gpu_is_chosen_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device("cuda:1") == torch.device("cuda", 1) == current[0]
    assert pick_device("cuda") == torch.device("cuda")
    with pytest.raises(ParamsError, match=r"device=cuda:2, but GPUs are .* PyTorch finds 2: "):
        pick_device("cuda:2")


def test_what_was_chosen_is_in_the_fingerprint(tiny_corpus: Params) -> None:
    """In a process of its own that may use AVX2 alone, where auto is float32."""
    params = change(tiny_corpus, prepare={"dtype": "auto"})
    limited = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "stages/prepare.py", "--params"]
    file = params.paths.corpus.parent / "auto.yaml"
    file.write_text(params.model_dump_json())
    done = subprocess.run(
        [*command, str(file)],
        cwd=ROOT,
        env=os.environ | limited,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("from a teacher in float32")
    assert open_cache(params).fingerprint.dtype == "float32"
