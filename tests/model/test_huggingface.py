"""Students that transformers runs: against its own logits, and against documents alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pipeline.errors import DecantError, ParamsError
from pipeline.evaluation.models import ProductModel
from pipeline.model.attention_mask import document_positions
from pipeline.model.decoder import StudentModel
from pipeline.model.huggingface import (
    HuggingFaceStudent,
    keeps_documents_apart,
    load_causal_lm,
)
from pipeline.model.weights import open_student, save_student
from pipeline.training.batches import Batch
from pipeline.training.distillation import DistillationLoss

VOCABULARY = 64
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": SHAPE | {"head_dim": None},
    "olmo2": SHAPE | {"tie_word_embeddings": True},
    "mistral": SHAPE | {"sliding_window": 4, "tie_word_embeddings": False},
    "gemma3_text": SHAPE
    | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "phi": SHAPE | {"tie_word_embeddings": False},
    "cohere": SHAPE | {"logit_scale": 0.5},
    "gemma2": SHAPE | {"sliding_window": 4, "final_logit_softcapping": 3.0},
}
KINDS["gemma3_text"]["num_hidden_layers"] = 4
TRAINABLE = ["olmo2", "mistral", "gemma3_text", "gpt2"]


def make_model(folder: Path, kind: str, **changes: Any) -> Path:
    config = CONFIG_MAPPING[kind](**(KINDS[kind] | changes))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # norms and biases start at 1 and 0, which would hide mistakes
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def some_tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, length))


@pytest.mark.parametrize("kind", TRAINABLE)
def test_hidden_states_times_head_are_the_logits(kind: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path, kind)
    student = open_student(folder)
    assert isinstance(student, HuggingFaceStudent)
    assert student.training
    assert (student.vocab_size, student.max_seq_len) == (VOCABULARY, 64)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    tokens = some_tokens(2, 20)
    ours = student.hidden_states(tokens) @ student.head_weight.T
    torch.testing.assert_close(ours, theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    assert student.count_parameters() == theirs.num_parameters()


@pytest.mark.parametrize("kind", TRAINABLE)
def test_a_document_does_not_see_what_is_packed_beside_it(kind: str, tmp_path: Path) -> None:
    student = open_student(make_model(tmp_path, kind)).eval()
    tokens = some_tokens(2, 20)
    doc_ids = torch.tensor([[3] * 7 + [4] + [9] * 12, [0] * 15 + [-1] * 5])
    packed = student.hidden_states(tokens, doc_ids)
    for row, start, stop in ((0, 0, 7), (0, 7, 8), (0, 8, 20), (1, 0, 15)):
        alone = student.hidden_states(tokens[row : row + 1, start:stop])[0]
        torch.testing.assert_close(packed[row, start:stop], alone, atol=1e-5, rtol=1e-4)
    unmasked = student.hidden_states(tokens)
    assert not torch.allclose(unmasked[0, 8:], packed[0, 8:], atol=1e-2)


def test_positions_are_counted_from_a_documents_start() -> None:
    doc_ids = torch.tensor([[7, 7, 9, 9, 9, -1], [5, 6, 8, 8, 8, 8]])
    expected = [[0, 1, 0, 1, 2, 3], [0, 0, 0, 1, 2, 3]]
    assert document_positions(doc_ids).tolist() == expected


def test_a_model_that_cannot_keep_documents_apart_says_so(tmp_path: Path) -> None:
    student = open_student(make_model(tmp_path, "bloom"))
    tokens = some_tokens(1, 8)
    assert student.hidden_states(tokens).shape == (1, 8, 32)
    with pytest.raises(DecantError, match="'bloom' student always attends across documents"):
        student.hidden_states(tokens, torch.tensor([[0] * 4 + [1] * 4]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", TRAINABLE)
def test_rounding_is_not_taken_for_a_leak(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = load_causal_lm(make_model(tmp_path, kind), dtype, what="teacher")
    assert keeps_documents_apart(model, VOCABULARY)


def test_a_bias_in_the_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DecantError, match="has a bias in its head"):
        open_student(make_model(tmp_path, "phi"))


@pytest.mark.parametrize("kind", ["cohere", "gemma2"])
def test_a_run_scales_and_caps_as_the_model_does(kind: str, tmp_path: Path) -> None:
    """What training reports for a batch, and evaluation's logits, are those of the model itself."""
    folder = make_model(tmp_path, kind)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = some_tokens(2, 20)
    labels = tokens.roll(-1, 1)
    own = model(tokens).logits
    for student in (open_student(folder), open_student(save_again(folder, tmp_path / "again"))):
        module = DistillationLoss(student, dtype=torch.float32, head_chunk=7)
        batch = Batch(tokens=tokens, labels=labels, doc_ids=None, topk=None)
        total, ce, _ = module(batch, alpha=0.5, temperature=2.0, divergence="forward_kl")
        expected = torch.nn.functional.cross_entropy(own.flatten(0, 1), labels.flatten())
        torch.testing.assert_close(ce / labels.numel(), expected, atol=1e-5, rtol=1e-5)
        total.backward()
    judged = ProductModel(open_student(folder), torch.float32)
    found = judged.logits(judged.states(tokens, None))
    torch.testing.assert_close(found, own.flatten(0, 1), atol=1e-5, rtol=1e-5)


def save_again(folder: Path, target: Path) -> Path:
    save_student(open_student(folder), target, tokenizer_from=None)
    return target


@pytest.mark.parametrize("kind", ["olmo2", "gemma3_text", "gpt2"])
def test_saved_student_opens_everywhere(kind: str, tmp_path: Path) -> None:
    student = open_student(make_model(tmp_path / "start", kind)).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.01
    save_student(student, tmp_path / "model", tokenizer_from=None)
    tokens = some_tokens(1, 16)
    expected = student.hidden_states(tokens) @ student.head_weight.T
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(theirs(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    again = open_student(tmp_path / "model").eval()
    assert torch.equal(again.hidden_states(tokens), student.hidden_states(tokens))
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("kind", ["olmo2", "gemma3_text", "gpt2"])
def test_chosen_layers(kind: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "start", kind)
    student = open_student(folder, layers=[2, 1]).eval()
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    stack = "h" if kind == "gpt2" else "layers"
    kept = getattr(theirs.base_model, stack)
    setattr(theirs.base_model, stack, torch.nn.ModuleList([kept[2], kept[1]]))
    theirs.config.num_hidden_layers = 2
    if kind == "gemma3_text":
        theirs.config.layer_types = ["sliding_attention", "full_attention"]
    tokens = some_tokens(2, 12)
    logits = theirs(tokens, use_cache=False).logits
    ours = student.hidden_states(tokens) @ student.head_weight.T
    torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-5)
    save_student(student, tmp_path / "model", tokenizer_from=None)
    reopened = open_student(tmp_path / "model").eval()
    assert torch.equal(reopened.hidden_states(tokens), student.hidden_states(tokens))
    for bad in ([7], [0, 0], []):
        with pytest.raises(ParamsError, match=r"student\.layers"):
            open_student(folder, layers=bad)


MOE = SHAPE | {
    "num_hidden_layers": 4,
    "decoder_sparse_step": 2,  # layers 1 and 3 are sparse
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


def test_layers_that_would_become_another_kind_are_refused(tmp_path: Path) -> None:
    KINDS["qwen3_moe"] = MOE
    folder = make_model(tmp_path / "start", "qwen3_moe")
    message = r"layer 1 of .* would be another kind of layer at place 0 of the student \(mlp"
    with pytest.raises(DecantError, match=message) as caught:
        open_student(folder, layers=[1, 3])
    assert "\n" not in str(caught.value)
    student = open_student(folder, layers=[0, 3]).eval()  # dense, sparse, as in front
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    theirs.model.layers = torch.nn.ModuleList([theirs.model.layers[0], theirs.model.layers[3]])
    theirs.config.num_hidden_layers = 2
    tokens = some_tokens(2, 12)
    ours = student.hidden_states(tokens) @ student.head_weight.T
    logits = theirs(tokens, use_cache=False).logits
    torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-5)


def test_layers_of_a_part_of_a_larger_model_are_refused(tmp_path: Path) -> None:
    inner = {key: value for key, value in KINDS["gemma3_text"].items() if key != "pad_token_id"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = CONFIG_MAPPING["gemma3"](
        text_config=inner, vision_config=vision, mm_tokens_per_image=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(DecantError, match="whose language model is a part of a larger one"):
        open_student(tmp_path, layers=[0, 1])


def test_variants_that_our_own_model_lacks_go_to_transformers(tmp_path: Path) -> None:
    plain = make_model(tmp_path / "plain", "llama")
    assert isinstance(open_student(plain), StudentModel)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    other = make_model(tmp_path / "scaled", "llama", rope_parameters=rope)
    assert isinstance(open_student(other), HuggingFaceStudent)


def test_what_a_config_leaves_out_transformers_knows(tmp_path: Path) -> None:
    """Llama 1's config.json says nothing of max_position_embeddings."""
    folder = make_model(tmp_path, "llama")
    raw = json.loads((folder / "config.json").read_text())
    del raw["max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(raw))
    student = open_student(folder)
    assert isinstance(student, HuggingFaceStudent)
    assert student.max_seq_len == 2048


@pytest.mark.parametrize(
    ("content", "words"),
    [("[1]", "must hold a JSON object"), ("{", "cannot be read"), ("null", "a JSON object")],
)
def test_what_is_no_config_is_one_sentence(content: str, words: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama")
    (folder / "config.json").write_text(content)
    with pytest.raises(DecantError, match=words):
        open_student(folder)


def test_both_engines_agree_on_values_and_gradients(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama")
    one, two = open_student(folder), HuggingFaceStudent(folder)
    tokens = some_tokens(2, 20)
    hidden = [student.hidden_states(tokens) for student in (one, two)]
    torch.testing.assert_close(hidden[0], hidden[1], atol=1e-5, rtol=1e-5)
    for state in hidden:
        state.square().sum().backward()
    theirs = dict(two.body.named_parameters())
    for name, parameter in one.body.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-4, rtol=1e-4)


def test_missing_tensors_are_not_drawn_at_random(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "olmo2")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DecantError, match=r"lacks 1 tensors, .*layers\.1\.mlp\.up_proj\.weight"):
        open_student(folder)


def shorten(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def widen(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"intermediate_size": 56}))


def no_heads(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"num_attention_heads": 0}))


@pytest.mark.parametrize("kind", ["llama", "olmo2"])  # ours, transformers
@pytest.mark.parametrize("damage", [shorten, widen, no_heads])
def test_damage_is_one_sentence(kind: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    folder = make_model(tmp_path, kind)
    damage(folder)
    with pytest.raises(DecantError, match=re.escape(str(folder))):
        open_student(folder)


def test_code_in_a_folder_is_not_run(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "olmo2")
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"model_type": "ours", "auto_map": {"AutoModelForCausalLM": "code.Model"}}
    raw["auto_map"]["AutoConfig"] = "code.Config"
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DecantError, match="is not a usable student"):
        open_student(folder)
    assert not (tmp_path / "ran").exists()
