"""What a run trains: any Hugging Face folder, adapters, vocabularies that must be shared."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from pipeline.config.params import Params
from pipeline.config.train_params import LoraParams
from pipeline.errors import DecantError, MismatchError, ParamsError
from pipeline.losses.chunked import distillation_loss_sums
from pipeline.model.decoder import StudentModel
from pipeline.model.huggingface import HuggingFaceStudent
from pipeline.model.lora import add_adapters, merge_adapters
from pipeline.model.weights import open_student
from pipeline.runtime.optional import install_hint
from pipeline.training.optim import build_optimizer
from pipeline.training.run import run_training
from tests.helpers import LORA, SMALL, change, from_folder, judge, run_with_power_cut
from tests.models import make_mistral, make_qwen3, make_tokenizer


@pytest.fixture
def mistral(tmp_path: Path) -> Path:
    return make_mistral(tmp_path / "mistral")


def curve(state: Any, name: str) -> list[float]:
    return [record[name] for record in state.history if name in record]


def test_a_student_of_transformers_learns_and_is_judged(
    tiny_cache: Params, mistral: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = from_folder(change(tiny_cache, train={"steps": 20}), mistral)
    result = run_training(params, "student")
    assert f"transformers runs {mistral}, a mistral model" in capsys.readouterr().out
    losses = curve(result.state, "validation/loss")
    assert losses[-1] < 0.95 * losses[0]
    model = result.folder / "model"
    theirs = AutoModelForCausalLM.from_pretrained(model)
    assert result.parameters == result.trained_parameters == theirs.num_parameters()
    assert (model / "tokenizer.json").exists()
    judged = judge(params, {"student": model})
    assert judged.parameters["student"] == theirs.num_parameters()
    assert judged.scores["student"].loss == pytest.approx(losses[-1], rel=0.1)
    assert run_training(params, "student").state is None


def test_layers_of_a_teacher_that_transformers_runs(tiny_corpus: Params, mistral: Path) -> None:
    params = change(tiny_corpus, paths={"teacher": str(mistral)}, train={"targets": "none"})
    params = change(params, student={"init": "layers", "layers": [2, 0]})
    result = run_training(params, "student")
    assert (
        AutoModelForCausalLM.from_pretrained(result.folder / "model").config.num_hidden_layers == 2
    )


def test_layers_of_a_qwen3_run_on_our_model(tiny_corpus: Params, tmp_path: Path) -> None:
    """With adapters, documents apart and blocks computed again."""
    teacher = make_qwen3(tmp_path / "qwen3")
    params = change(tiny_corpus, paths={"teacher": str(teacher)}, train={"targets": "none"})
    params = change(params, run={"activation_checkpointing": True})
    params = change(params, student={"layers": [2, 0], "lora": LORA})
    assert params.prepare.document_mask
    result = run_training(params, "student")
    losses = curve(result.state, "validation/loss")
    assert losses[-1] < losses[0]
    trained = open_student(result.folder / "model").eval()
    assert isinstance(trained, StudentModel)
    theirs = AutoModelForCausalLM.from_pretrained(result.folder / "model").eval()
    assert (theirs.config.model_type, theirs.config.num_hidden_layers) == ("qwen3", 2)
    tokens = torch.randint(0, 300, (2, 16))
    torch.testing.assert_close(trained(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


def test_a_qwen3_may_start_at_random(tiny_corpus: Params) -> None:
    shape = {"head_dim": 12, "qk_norm": True, "attention_bias": False}
    params = change(tiny_corpus, train={"targets": "none", "steps": 2})
    params = change(params, student=SMALL | shape | {"init": "random", "max_seq_len": 32})
    model = run_training(params, "student").folder / "model"
    config = AutoModelForCausalLM.from_pretrained(model).config
    assert (config.model_type, config.head_dim, config.attention_bias) == ("qwen3", 12, False)
    open_student(model)


@pytest.mark.parametrize("engine", ["ours", "transformers"])
def test_interrupted_adapters_continue_exactly(
    engine: str, tiny_cache: Params, mistral: Path
) -> None:
    """With dropout, so that mode and random state count."""
    lora = {"lora": LORA | {"dropout": 0.3}}
    params = change(tiny_cache, student=lora)
    if engine == "transformers":
        params = from_folder(tiny_cache, mistral, **lora)
    run_training(params, "whole")
    run_with_power_cut(params, "broken", before_step=5)
    run_training(params, "broken")
    one, two = (
        load_file(params.paths.runs / run / "model" / "model.safetensors")
        for run in ("whole", "broken")
    )
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


@pytest.mark.parametrize("engine", ["ours", "transformers"])
def test_adapters_alone_are_trained_and_merged(
    engine: str, tiny_cache: Params, mistral: Path
) -> None:
    params = change(tiny_cache, train={"steps": 30, "learning_rate": 0.02})
    start = mistral if engine == "transformers" else run_training(params, "start").folder / "model"
    result = run_training(from_folder(params, start, lora=LORA), "student")
    kind = HuggingFaceStudent if engine == "transformers" else StudentModel
    trained = open_student(result.folder / "model").eval()
    assert type(trained) is kind
    losses = curve(result.state, "validation/loss")
    assert losses[-1] < losses[0]

    before = load_file(start / "model.safetensors")
    after = load_file(result.folder / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        changed = any(target in name for target in LORA["targets"]) and name.endswith("weight")
        assert torch.equal(tensor, after[name]) != changed, name
        if changed:  # B A has rank 4 at most
            assert int(torch.linalg.matrix_rank(after[name] - tensor, atol=1e-4)) <= 4, name
    sizes = [(p.shape[0] + p.shape[1]) * 4 for n, p in before.items() if "v_proj.weight" in n]
    sizes += [(p.shape[0] + p.shape[1]) * 4 for n, p in before.items() if "down_proj" in n]
    sizes += [(p.shape[0] + p.shape[1]) * 4 for n, p in before.items() if "q_proj.weight" in n]
    assert result.trained_parameters == sum(sizes)
    assert result.parameters == sum(tensor.numel() for tensor in before.values())

    base = AutoModelForCausalLM.from_pretrained(start)
    alone = PeftModel.from_pretrained(base, result.folder / "adapter").eval()
    tokens = torch.randint(0, 300, (2, 16))
    merged = trained.hidden_states(tokens) @ trained.head_weight.T
    torch.testing.assert_close(alone(tokens).logits, merged, atol=1e-4, rtol=1e-4)
    about = json.loads((result.folder / "adapter" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(start)


def test_one_step_of_an_adapter_by_hand(tiny_params: Params) -> None:
    """W + (alpha / rank) B A, and the first gradient of B, against autograd over W itself."""
    student = open_student(tiny_params.paths.teacher)
    plain = copy.deepcopy(student)
    lora = LoraParams(rank=4, alpha=6.0, dropout=0.0, targets=("o_proj",))
    adapters = add_adapters(student, lora)
    tokens = torch.randint(0, 300, (2, 12))
    assert torch.equal(student.hidden_states(tokens), plain.hidden_states(tokens))
    for model in (student, plain):
        model.hidden_states(tokens).square().sum().backward()  # type: ignore[no-untyped-call]
    layer = student.model.layers[1].self_attn.o_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    full = plain.model.layers[1].self_attn.o_proj.weight.grad
    torch.testing.assert_close(b.grad, 1.5 * full @ a.T, atol=1e-4, rtol=1e-4)
    optimizer = build_optimizer(student, tiny_params.train)
    optimizer.step()
    expected = plain.model.layers[1].self_attn.o_proj.weight + 1.5 * b @ a
    merge_adapters(adapters)
    torch.testing.assert_close(student.model.layers[1].self_attn.o_proj.weight, expected)
    names = [name for name, _ in student.named_parameters()]
    assert names == [name for name, _ in plain.named_parameters()]


def test_the_optimizer_holds_what_is_trained_alone(tiny_params: Params) -> None:
    student = open_student(tiny_params.paths.teacher)
    add_adapters(student, LoraParams(**LORA))
    held = [
        p
        for group in build_optimizer(student, tiny_params.train).param_groups
        for p in group["params"]
    ]
    assert sum(p.numel() for p in held) == student.count_parameters(trained_only=True)
    assert not student.head_weight.requires_grad


class _Products(TorchDispatchMode):
    """Counts new tensors of the head's shape."""

    def __init__(self, head: Tensor) -> None:
        super().__init__()
        self.head = head
        self.new = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.shape == self.head.shape:
                self.new += tensor.data_ptr() != self.head.data_ptr()
        return out


def test_a_frozen_head_gets_no_gradient() -> None:
    """Nor is room made for one: at 152k x 4096 it would be 2.5 GB."""
    hidden = torch.randn(10, 24, requires_grad=True)
    head, labels = torch.randn(37, 24), torch.randint(0, 37, (10,))
    with _Products(head) as products:
        sums = distillation_loss_sums(hidden, head, labels, None, alpha=0.5, temperature=1.0)
        sums.total.backward()  # type: ignore[no-untyped-call]
    assert products.new == 0
    assert head.grad is None
    assert hidden.grad is not None
    expected = hidden.detach().clone().requires_grad_()
    torch.nn.functional.cross_entropy(expected @ head.T, labels, reduction="sum").backward()
    torch.testing.assert_close(hidden.grad, expected.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"init": "random", "lora": LORA}, "lora trains adapters beside frozen weights"),
        ({"lora": LORA | {"targets": []}}, "targets"),
    ],
)
def test_adapters_that_cannot_be_are_refused(
    student: dict[str, Any], message: str, tiny_params: Params
) -> None:
    with pytest.raises(ValueError, match=message):
        change(tiny_params, student=student)


def test_targets_that_the_student_lacks_are_named(tiny_cache: Params) -> None:
    for target in ("c_attn", "lm_head"):  # losses read the head's matrix past any adapter
        params = change(tiny_cache, student={"lora": LORA | {"targets": ["q_proj", target]}})
        with pytest.raises(ParamsError, match=rf"names {target}, .*: its linear layers are down_p"):
            run_training(params, "student")


def test_without_peft_one_sentence_says_how_to_get_it(
    tiny_cache: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DecantError, match=re.escape(install_hint("lora"))):
        run_training(change(tiny_cache, student={"lora": LORA}), "student")


def test_a_name_on_the_hub_is_no_folder(tiny_cache: Params) -> None:
    params = from_folder(tiny_cache, Path("Qwen/Qwen2.5-0.5B"))
    with pytest.raises(ParamsError, match=r"hf download Qwen/Qwen2\.5-0\.5B --local-dir FOLDER"):
        run_training(params, "student")


def test_a_student_of_another_family_is_refused(
    tiny_cache: Params, mistral: Path, tmp_path: Path
) -> None:
    make_tokenizer(mistral, vocab_size=280)
    with pytest.raises(MismatchError, match=r"id 280 is None there"):
        run_training(from_folder(tiny_cache, mistral), "student")
    assert not (tiny_cache.paths.runs / "student" / "model").exists()
    small = make_mistral(tmp_path / "small", rows=299)
    with pytest.raises(ParamsError, match="299 vocabulary rows, the corpus uses"):
        run_training(from_folder(tiny_cache, small), "other")


def test_a_cached_run_needs_no_teacher(tiny_cache: Params, mistral: Path, tmp_path: Path) -> None:
    """The student's own tokenizer goes with it."""
    shutil.copy(tiny_cache.paths.teacher / "tokenizer.json", mistral)
    params = change(tiny_cache, paths={"teacher": str(tmp_path / "gone")}, train={"steps": 1})
    result = run_training(from_folder(params, mistral), "student")
    assert (result.folder / "model" / "tokenizer.json").exists()


def test_a_teacher_with_another_tokenizer_is_no_start(tiny_cache: Params, tmp_path: Path) -> None:
    """init=layers takes the teacher's embedding, so the corpus must be of its tokenizer."""
    other = make_mistral(tmp_path / "other")
    make_tokenizer(other, vocab_size=290)
    params = change(tiny_cache, paths={"teacher": str(other)}, train={"targets": "none"})
    with pytest.raises(MismatchError, match="does not hold for a comparison"):
        run_training(change(params, student={"layers": [0]}), "student")


def test_another_start_is_another_run(tiny_cache: Params, mistral: Path) -> None:
    params = from_folder(tiny_cache, mistral)
    run_training(params, "student")
    make_mistral(mistral, seed=6)
    with pytest.raises(MismatchError, match="start_sha256"):
        run_training(params, "student")
    assert run_training(params, "student", overwrite=True).state is not None


def test_a_tokenizer_that_could_not_be_saved_is_refused_before_training(
    tiny_cache: Params, tmp_path: Path
) -> None:
    teacher = shutil.copytree(tiny_cache.paths.teacher, tmp_path / "linked")
    (teacher / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (teacher / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    params = change(tiny_cache, paths={"teacher": str(teacher)})
    with pytest.raises(DecantError, match=r"tokenizer\.json is a link to .*, outside"):
        run_training(params, "student")
    assert not (params.paths.runs / "student" / "dvclive").exists()  # no step was taken
