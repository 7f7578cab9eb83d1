"""Quantised teachers run quantised, dequantised where asked, or not at all: never in silence."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.capture.capture import open_captures
from pipeline.capture.local import capture_locally
from pipeline.config.params import Params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.errors import DecantError, ParamsError
from pipeline.evaluation.models import open_models
from pipeline.evaluation.samples import Run, sample
from pipeline.model import quantization
from pipeline.model.quantization import (
    QuantizedError,
    describe_weights,
    read_quantization,
    require_plain_head_weight,
)
from pipeline.model.weights import open_student
from pipeline.runtime.device import place_rounded
from pipeline.teacher import engines
from pipeline.teacher.transformers import HuggingFaceTeacher
from pipeline.training.run import _identity
from stages.evaluate import main as evaluate
from stages.verify import main as verify
from tests.helpers import change, gate, open_cache
from tests.models import edit_json, make_teacher, make_tokenizer

CPU = torch.device("cpu")
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}


def compressed(kind: str, bits: int = 8) -> dict[str, Any]:
    shared = {"num_bits": bits, "type": kind, "symmetric": True}
    weights = shared | {"strategy": "channel", "dynamic": False}
    inputs = shared | {"strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def quantize(folder: Path, config: dict[str, Any], scale: str) -> Path:
    """Store the layers' matrices in FP8, and the scales under a name; by blocks of 32 x 32."""
    tensors = load_file(folder / "model.safetensors")
    stored = dict(tensors)
    for name, weight in tensors.items():
        if "_proj.weight" not in name:
            continue
        blocks = weight.view(len(weight) // 32, 32, -1, 32)
        scales = blocks.abs().amax((1, 3)) / 448.0
        if scale == "weight_scale":  # one for each row
            blocks = weight.view(len(weight), 1, 1, -1)
            scales = blocks.abs().amax((1, 3)) / 448.0
        scaled = blocks / scales[:, None, :, None]
        stored[name] = scaled.view_as(weight).to(torch.float8_e4m3fn)
        stored[name.replace("weight", scale)] = scales
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", quantization_config=config)
    return folder


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    return quantize(make_teacher(tmp_path / "fp8"), FP8, "weight_scale_inv")


def open_teacher(
    folder: Path, dtype: torch.dtype = torch.float32, **options: Any
) -> HuggingFaceTeacher:
    return HuggingFaceTeacher(folder, vocab_size=300, dtype=dtype, device=CPU, **options)


def logits_of(teacher: HuggingFaceTeacher) -> torch.Tensor:
    tokens = torch.arange(40).view(2, 20)
    return torch.cat([logits.clone() for _, logits in teacher.logits_by_chunk(tokens)])


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (FP8, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "awq", "bits": 4}, "awq int4"),
        ({"quant_method": "gptq", "bits": 8}, "gptq int8"),
        (compressed("float"), "compressed-tensors float-quantized"),
        ({"load_in_8bit": True}, "bitsandbytes int8"),  # as of old, without a method
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "bitsandbytes nf4",
        ),
        (
            {
                "quant_method": "torchao",
                "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}},
            },
            "torchao Int8WeightOnly",
        ),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao int8_weight_only"),
    ],
)
def test_quantisation_is_named(config: dict[str, Any], name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    found = read_quantization(tmp_path)
    assert found is not None
    assert found.name == name
    assert describe_weights(found, dequantize=True) == f", {name} dequantized"
    (tmp_path / "config.json").write_text(
        json.dumps({"text_config": {"quantization_config": config}})
    )
    assert read_quantization(tmp_path) == found  # of a vision model's language model


def test_a_plain_folder_is_not_quantised(teacher_folder: Path, tmp_path: Path) -> None:
    assert read_quantization(teacher_folder) is None
    assert read_quantization(tmp_path) is None
    assert describe_weights(None, dequantize=True) == ""


@pytest.fixture
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "_is_installed", lambda _: True)


def refusal(folder: Path, config: dict[str, Any], **options: Any) -> str:
    edit_json(folder / "config.json", quantization_config=config)
    with pytest.raises(DecantError) as refused:
        open_teacher(folder, **options)
    return str(refused.value)


def test_fp8_is_not_dequantised_in_silence(fp8: Path, everything_installed: None) -> None:
    said = refusal(fp8, FP8)
    assert "transformers would dequantise it on this device (cpu)" in said
    assert "compute capability 8.9" in said
    assert "prepare.engine=vllm" in said
    assert "prepare.dequantize=true" in said


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize("method", ["mxfp4", "mxfp8", "compressed-tensors"])
def test_neither_are_others_without_a_gpu(method: str, fp8: Path) -> None:
    said = refusal(fp8, compressed("float") | {"quant_method": method})
    assert "would dequantise it on this device (cpu)" in said


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize(("capability", "runs"), [((8, 6), False), ((8, 9), True)])
def test_the_gpu_decides(
    capability: tuple[int, int], runs: bool, fp8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "GeForce RTX 3090")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = read_quantization(fp8)
    assert found is not None

    def options() -> dict[str, Any]:
        device = torch.device("cuda", 0)
        return found.load_options(torch.bfloat16, device, what="teacher", dequantize=False)

    if runs:
        assert options()["device_map"] == {"": torch.device("cuda", 0)}
    else:
        with pytest.raises(QuantizedError, match=r"\(GeForce RTX 3090, 8\.6\)"):
            options()


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize(
    "config",
    [
        compressed("int"),
        compressed("int", 4),
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": None}}},
    ],
)
def test_schemes_that_the_first_pass_would_expand(
    config: dict[str, Any], fp8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization.Quantization, "_require_gpu", lambda *_: None)
    assert "only FP8 weights with FP8 activations of compressed-tensors" in refusal(fp8, config)


@pytest.mark.parametrize(
    ("config", "package", "remedy"),
    [
        (FP8, "kernels", "'transformers[kernels]'"),
        ({"quant_method": "mxfp4"}, "kernels", "'transformers[kernels]'"),
        (compressed("float"), "compressed_tensors", "compressed-tensors"),
        ({"load_in_8bit": True}, "bitsandbytes", "bitsandbytes"),
        ({"quant_method": "torchao"}, "torchao", "torchao"),
        ({"quant_method": "awq"}, "gptqmodel", "gptqmodel"),
        ({"quant_method": "gptq"}, "gptqmodel and optimum", "gptqmodel optimum"),
    ],
)
def test_a_missing_package_is_named(
    config: dict[str, Any], package: str, remedy: str, fp8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = ("accelerate", "triton")
    monkeypatch.setattr(quantization, "_is_installed", lambda name: name in there)
    said = refusal(fp8, config)
    assert f"transformers needs {package}: install by `pip install {remedy}`, set " in said
    assert "\n" not in said


@pytest.mark.usefixtures("everything_installed")
def test_what_transformers_itself_lacks_is_said(fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers.auto import AutoHfQuantizer

    def too_old(*_: object, **__: object) -> None:
        raise ImportError("gptqmodel>=9 is needed")

    monkeypatch.setattr(AutoHfQuantizer, "from_config", too_old)
    said = refusal(fp8, {"quant_method": "awq", "bits": 4})
    assert "transformers cannot run that here (gptqmodel>=9 is needed)" in said


def test_a_method_that_nobody_knows(fp8: Path) -> None:
    """Transformers would load the stored bytes as if they were the weights."""
    assert "is quantised by 'odd', which Decant does not open" in refusal(
        fp8, {"quant_method": "odd"}
    )


def test_dequantised_by_an_explicit_key(fp8: Path, tmp_path: Path) -> None:
    teacher = open_teacher(fp8, dequantize=True)
    assert teacher.describe() == "a llama of 0.2 M parameters, fp8 dequantized, in float32 on cpu"
    plain = make_teacher(tmp_path / "plain")  # the same weights, multiplied out by hand
    stored = load_file(fp8 / "model.safetensors")
    for name in [name for name in stored if name.endswith("weight_scale_inv")]:
        scales = stored.pop(name).repeat_interleave(32, 0).repeat_interleave(32, 1)
        weight = name.removesuffix("_scale_inv")
        stored[weight] = stored[weight].float() * scales
    save_file(stored, plain / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits_of(teacher), logits_of(open_teacher(plain)))


def test_only_what_transformers_can_is_dequantised(fp8: Path) -> None:
    said = refusal(fp8, {"quant_method": "awq", "bits": 4}, dequantize=True)
    assert "transformers dequantises fp8, mxfp8, mxfp4, compressed-tensors" in said


def test_float16_on_a_cpu_would_round_the_weights(fp8: Path) -> None:
    with pytest.raises(ParamsError, match="float16 on a CPU rounds the weights"):
        open_teacher(fp8, torch.float16)
    assert open_teacher(fp8, torch.float16, dequantize=True).dtype == torch.float16


def test_scales_that_are_left_out(fp8: Path) -> None:
    stored = load_file(fp8 / "model.safetensors")
    stored["model.layers.0.mlp.up_proj.weight_absmax"] = torch.ones(1)
    save_file(stored, fp8 / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DecantError, match=r"leaves out 1 tensors .*up_proj\.weight_absmax"):
        open_teacher(fp8, dequantize=True)


def test_scales_of_what_is_left_out_as_a_whole(fp8: Path) -> None:
    """A layer for several tokens at once, as of DeepSeek, and scales of a cache of keys."""
    stored = load_file(fp8 / "model.safetensors")
    stored["model.layers.4.mlp.up_proj.weight"] = torch.ones(1)
    stored["model.layers.4.mlp.up_proj.weight_scale_inv"] = torch.ones(1)
    stored["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    save_file(stored, fp8 / "model.safetensors", metadata={"format": "pt"})
    open_teacher(fp8, dequantize=True)


class Loaded(nn.Module):
    """What transformers might return."""

    def __init__(self, *, is_quantized: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 4, dtype=dtype)
        self.is_quantized = is_quantized
        self.device = CPU

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, **_: object) -> None:
        raise ImportError("the kernel needs the hub")


@pytest.mark.parametrize(
    ("is_quantized", "dtype", "said"),
    [
        (False, torch.bfloat16, r"transformers dequantised .*prepare\.engine=vllm"),
        (True, torch.float16, "computes in float16 whatever is asked, and bfloat16 was asked"),
        (True, torch.bfloat16, r"kernels do not run here \(the kernel needs the hub\)"),
    ],
)
def test_what_was_loaded_is_looked_at(
    is_quantized: bool, dtype: torch.dtype, said: str, fp8: Path
) -> None:
    found = read_quantization(fp8)
    assert found is not None
    model = Loaded(is_quantized=is_quantized, dtype=dtype)
    with pytest.raises(DecantError, match=said):
        found.require_loaded_so(model, set(), torch.bfloat16, what="teacher", dequantize=False)


def test_students_start_from_plain_weights(fp8: Path) -> None:
    with pytest.raises(QuantizedError, match=r"is quantised \(fp8\), and a student"):
        open_student(fp8)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantised_head_is_refused(dtype: torch.dtype, teacher_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher_folder)
    require_plain_head_weight(teacher_folder, model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(dtype), requires_grad=False)
    with pytest.raises(QuantizedError, match=r"head of .* is quantised too"):
        require_plain_head_weight(teacher_folder, model)


def test_a_quantised_model_is_not_rounded() -> None:
    model = nn.Linear(4, 4)
    model.is_quantized = True  # type: ignore[assignment]
    assert place_rounded(model, torch.bfloat16, CPU).weight.dtype == torch.float32


def test_the_fingerprint_names_the_quantisation(tiny_corpus: Params, tmp_path: Path) -> None:
    folder = quantize(make_teacher(tmp_path / "fp8"), FP8, "weight_scale_inv")
    pointer = {"source": "folder", "model": str(folder)}
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "source.json").write_text(json.dumps(pointer))
    paths = {"teacher": str(teacher), "logits": str(tmp_path / "logits")}
    params = change(tiny_corpus, paths=paths)
    with pytest.raises(QuantizedError, match="is quantised"):
        open_captures(params)
    params = change(params, prepare={"dequantize": True})
    capture_locally(params)
    (first, _) = open_captures(params)
    assert first.fingerprint.engine == "transformers, fp8 dequantized"
    assert first.fingerprint.teacher_sha256 != _hash_with(folder, weight_block_size=[64, 64])


def test_evaluate_and_verify_take_a_dequantised_teacher(
    tiny_corpus: Params, tmp_path: Path
) -> None:
    folder = quantize(make_teacher(tmp_path / "fp8"), FP8, "weight_scale_inv")
    plain, file = tiny_corpus.paths.teacher, str(tmp_path / "params.yaml")
    words = ["--params", file, "--set", f"paths.teacher={folder}"]
    refused = CliRunner().invoke(evaluate, [*words, "--model", f"plain={plain}"])
    assert refused.exit_code == 1
    assert refused.output.count("error: ") == 1
    words += ["--set", "prepare.dequantize=true"]
    done = CliRunner().invoke(evaluate, [*words, "--model", f"plain={plain}"])
    assert done.exit_code == 0, done.output
    assert "fp8 dequantized, in float32 on cpu" in done.output
    scores = json.loads((tiny_corpus.paths.evaluate / "metrics.json").read_text())
    done = CliRunner().invoke(verify, [*words, "--against", str(plain)])
    assert done.exit_code == 0, done.output
    report = json.loads((tiny_corpus.paths.verify / "against.json").read_text())
    assert report["kl"] > 0.0
    assert report["teacher_loss"] == pytest.approx(scores["teacher"]["loss"], rel=1e-5)
    plain_words = ["--params", file, "--against", str(folder)]
    refused = CliRunner().invoke(verify, plain_words)
    assert "or use the unquantised model" in refused.output
    assert "prepare." not in refused.output  # no key changes how that model is opened


def test_the_gate_refuses_a_cache_of_the_same_weights_run_otherwise(
    tiny_corpus: Params, tmp_path: Path
) -> None:
    folder = quantize(make_teacher(tmp_path / "fp8"), FP8, "weight_scale_inv")
    params = change(tiny_corpus, paths={"teacher": str(folder)}, prepare={"dequantize": True})
    capture_locally(params)
    words = ["--params", str(tmp_path / "params.yaml"), "--set", f"paths.teacher={folder}"]
    refused = CliRunner().invoke(verify, words)
    assert refused.exit_code == 1
    said = "was made with engine=transformers, fp8 dequantized, wanted is transformers, fp8"
    assert said in refused.output


def test_an_online_run_knows_how_its_teacher_ran(tiny_corpus: Params, tmp_path: Path) -> None:
    folder = quantize(make_teacher(tmp_path / "fp8"), FP8, "weight_scale_inv")
    corpus = CorpusSplit(tiny_corpus.paths.corpus, "train")
    params = change(tiny_corpus, paths={"teacher": str(folder)}, train={"targets": "online"})
    engines = [
        _identity(change(params, prepare={"dequantize": dequantize}), corpus, CPU)["online"][
            "engine"
        ]
        for dequantize in (False, True)
    ]
    assert engines == ["transformers, fp8", "transformers, fp8 dequantized"]


def _hash_with(folder: Path, **changes: Any) -> str:
    from pipeline.model.folder import hash_weights

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", quantization_config=config | changes)
    return hash_weights(folder)


# With the packages of the extra `quantization`.


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"needs {package} (.[quantization])"
    )


def _torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _bitsandbytes(**options: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


QUANTIZED = [
    pytest.param(_torchao, "torchao Int8WeightOnly", marks=needs("torchao")),
    pytest.param(
        lambda: _bitsandbytes(load_in_8bit=True),
        "bitsandbytes int8",
        marks=needs("bitsandbytes"),
    ),
    pytest.param(
        lambda: _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "bitsandbytes nf4",
        marks=needs("bitsandbytes"),
    ),
]


@pytest.mark.parametrize(("config", "name"), QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_teacher_runs_quantised(
    config: Any, name: str, dtype: torch.dtype, tmp_path: Path, tiny_corpus: Params
) -> None:
    folder, plain = tmp_path / "model", make_teacher(tmp_path / "plain")
    make_tokenizer(folder)
    exact = logits_of(open_teacher(plain))
    options: Any = {"dtype": dtype, "quantization_config": config()}
    theirs = AutoModelForCausalLM.from_pretrained(plain, **options).eval()
    theirs.save_pretrained(folder)
    teacher = open_teacher(folder, dtype)
    assert f"parameters, {name}, in" in teacher.describe()
    layer = teacher.model.model.layers[0].mlp.up_proj.weight
    assert type(layer) is type(theirs.model.layers[0].mlp.up_proj.weight) is not nn.Parameter
    found = logits_of(teacher)
    wanted = theirs(torch.arange(40).view(2, 20)).logits.float().flatten(0, 1)[:, :300].detach()
    if dtype == torch.float32:
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-5)
    else:
        assert float((found - wanted).norm() / wanted.norm()) < 5e-3  # their logits are rounded
    error = float((found - exact).norm() / exact.norm())
    assert 1e-3 < error < 0.5  # quantised, and not something else
    if dtype == torch.float32:
        corpus = CorpusSplit(tiny_corpus.paths.corpus, "validation")
        judged = open_models(
            {"quantised": folder}, corpus, plain, dtypes={"quantised": dtype}, device=CPU
        )["quantised"]
        states = judged.states(torch.arange(40).view(2, 20), None)
        torch.testing.assert_close(judged.logits(states)[:, :300], wanted, rtol=0.0, atol=1e-5)
        texts = sample(folder, ("the cat",), 3, Run(dtype, CPU))
        assert len(texts) == 1


@pytest.mark.parametrize(("config", "name"), QUANTIZED)
def test_a_capture_through_it_passes_the_gate(
    config: Any, name: str, tiny_corpus: Params, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    options: Any = {"dtype": torch.float32, "quantization_config": config()}
    plain = tiny_corpus.paths.teacher
    AutoModelForCausalLM.from_pretrained(plain, **options).save_pretrained(folder)
    make_tokenizer(folder)
    params = change(tiny_corpus, paths={"teacher": str(folder)})
    capture_locally(params)
    assert open_cache(params).fingerprint.engine == f"transformers, {name}"
    report = gate(params, engines.open_teacher(params, 300, torch.float32, CPU))
    assert report.passed, report.failures
    of_plain = HuggingFaceTeacher(plain, vocab_size=300, dtype=torch.float32, device=CPU)
    assert not gate(params, of_plain).passed  # so the quantised model is the one that was captured


@needs("torchao")
def test_torchao_can_quantise_the_head(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(), include_input_output_embeddings=True)
    plain = make_teacher(tmp_path / "plain", tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
    model.save_pretrained(plain)
    with pytest.raises(QuantizedError, match=r"head of .* is quantised too"):
        open_teacher(plain)


@needs("compressed_tensors")
def test_compressed_tensors_are_dequantised_by_the_key(tmp_path: Path) -> None:
    plain = make_teacher(tmp_path / "plain")
    exact = logits_of(open_teacher(plain))
    folder = quantize(make_teacher(tmp_path / "model"), compressed("float"), "weight_scale")
    with pytest.raises(QuantizedError, match=r"on this device \(cpu\)"):
        open_teacher(folder)
    found = logits_of(open_teacher(folder, dequantize=True))
    assert 1e-3 < float((found - exact).norm() / exact.norm()) < 0.2
