"""The student against Hugging Face, and its traps."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
)
from transformers.models.llama.modeling_llama import eager_attention_forward

from pipeline.errors import DecantError, ParamsError
from pipeline.model import decoder
from pipeline.model.decoder import (
    ModelConfig,
    RMSNorm,
    StudentModel,
    attend,
    attention_plain,
)
from pipeline.model.huggingface import HuggingFaceStudent
from pipeline.model.weights import load_student, open_student, read_config, save_student
from tests.models import hugging_face, move_norms


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {}),
        ("qwen2", {"head_dim": 4}),
        ("llama", {}),
        ("llama", {"head_dim": 12}),
        ("qwen3", {}),
        ("qwen3", {"head_dim": 8, "num_key_value_heads": 8}),
        ("qwen3", {"hidden_size": 60}),  # no multiple of the 8 heads
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_gradients_equal_hugging_face(
    kind: str, changes: dict[str, int], tied: bool, tmp_path: Path
) -> None:
    theirs = hugging_face(kind, tied, **changes)
    theirs.save_pretrained(tmp_path)
    ours = load_student(tmp_path)
    tokens = torch.randint(0, 257, (3, 40))
    expected = theirs(tokens).logits
    logits = ours(tokens)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    logits.square().mean().backward()
    expected.square().mean().backward()
    by_name = dict(theirs.named_parameters())
    assert by_name.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, by_name[name].grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head_dim", [None, 12])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_saved_student_opens_in_hugging_face(
    bias: bool, tied: bool, head_dim: int | None, qk_norm: bool, tmp_path: Path
) -> None:
    config = ModelConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=1,
        intermediate_size=48,
        vocab_size=99,
        head_dim=head_dim,
        attention_bias=bias,
        qk_norm=qk_norm,
        tie_embeddings=tied,
    )
    student = StudentModel(config).eval()
    move_norms(student)
    save_student(student, tmp_path / "model", tokenizer_from=None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert theirs.config.model_type == ("qwen3" if qk_norm else "qwen2" if bias else "llama")
    tokens = torch.randint(0, 99, (2, 17))
    torch.testing.assert_close(theirs(tokens).logits, student(tokens), atol=1e-5, rtol=1e-5)
    assert read_config(tmp_path / "model") == config
    before = torch.get_rng_state()
    again = load_student(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)  # no weight was initialised first
    assert torch.equal(again(tokens), student(tokens))


def test_default_student_has_123_million_parameters() -> None:
    with torch.device("meta"):
        student = StudentModel(ModelConfig())
    attention = 2 * 512 * 512 + 2 * 512 * 128 + 512 + 2 * 128  # q, o; k, v; biases of q, k, v
    block = attention + 3 * 512 * 2048 + 2 * 512
    assert student.count_parameters() == 151_936 * 512 + 12 * block + 512 == 123_426_304


def test_a_qwen3_without_head_dim_has_heads_as_wide_as_transformers_says(tmp_path: Path) -> None:
    theirs = hugging_face("qwen3", True, head_dim=128, num_hidden_layers=1)
    theirs.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_config(tmp_path).head_size == 128
    tokens = torch.randint(0, 257, (1, 12))
    logits = theirs(tokens).logits
    torch.testing.assert_close(load_student(tmp_path)(tokens), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_sliding_windows_are_left_to_transformers(kind: str, tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    theirs = hugging_face(kind, True, **window)
    theirs.save_pretrained(tmp_path)
    student = open_student(tmp_path).eval()
    assert isinstance(student, HuggingFaceStudent)
    tokens = torch.randint(0, 257, (1, 12))
    logits = student.hidden_states(tokens) @ student.head_weight.T
    torch.testing.assert_close(logits, theirs(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_chosen_layers_of_a_teacher(kind: str, tmp_path: Path) -> None:
    theirs = hugging_face(kind, True)
    theirs.save_pretrained(tmp_path)
    ours = load_student(tmp_path, layers=[2, 0])
    kept = theirs.model.layers
    theirs.model.layers = torch.nn.ModuleList([kept[2], kept[0]])
    tokens = torch.randint(0, 257, (1, 12))
    logits = theirs(tokens, use_cache=False).logits
    torch.testing.assert_close(ours(tokens), logits, atol=1e-5, rtol=1e-5)
    for bad in ([3], [0, 0], []):
        with pytest.raises(ParamsError, match=r"student\.layers"):
            load_student(tmp_path, layers=bad)


def test_attention_is_causal() -> None:
    student = StudentModel(ModelConfig(hidden_size=32, num_heads=4, num_layers=2, vocab_size=50))
    tokens = torch.randint(0, 50, (1, 20))
    changed = tokens.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 50
    before, after = student(tokens), student(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (1, 9)])
@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_equals_the_plain_softmax(queries: int, keys: int, masked: bool) -> None:
    """`attend` against `attention_plain`, in value and gradient."""
    shapes = [(2, 8, queries, 4), (2, 2, keys, 4), (2, 2, keys, 4)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    mask = None
    if masked:
        mask = torch.rand(2, 1, queries, keys) < 0.6
        mask[..., -1] = True
    found = attend(*inputs, mask, 0.0)
    expected, weights, scores = attention_plain(*inputs, mask)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(weights, scores.exp() / scores.exp().sum(-1, keepdim=True))
    direction = torch.randn_like(expected)
    for one, two in zip(
        torch.autograd.grad(found, inputs, direction),
        torch.autograd.grad(expected, inputs, direction),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


def test_plain_attention_equals_hugging_face_step_by_step() -> None:
    q, k, v = torch.randn(2, 8, 5, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    causal = torch.full((5, 5), -torch.inf).triu(1)
    module = SimpleNamespace(num_key_value_groups=4, training=False)
    expected, weights = eager_attention_forward(module, q, k, v, causal, scaling=0.5)
    mixed, our_weights, scores = attention_plain(q, k, v)
    torch.testing.assert_close(mixed, expected.transpose(1, 2))
    torch.testing.assert_close(our_weights, weights)
    assert scores[0, 5, 3, 2].item() == pytest.approx((q[0, 5, 3] @ k[0, 1, 2]).item() / 2)
    assert scores[0, 5, 2, 3].item() == -torch.inf


def test_norms_leave_queries_and_keys_in_the_format_of_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under autocast, in which norms give float32 and FlashAttention's kernel takes no mixture."""
    formats: set[torch.dtype] = set()

    def recorded(*inputs: torch.Tensor) -> torch.Tensor:
        formats.update(x.dtype for x in inputs[:3])
        return attend(*inputs)

    monkeypatch.setattr(decoder, "attend", recorded)
    shape = {"hidden_size": 32, "num_heads": 4, "num_layers": 1, "vocab_size": 50}
    student = StudentModel(ModelConfig(**shape, qk_norm=True))  # type: ignore[arg-type]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student.hidden_states(torch.randint(0, 50, (1, 8)))
    assert formats == {torch.bfloat16}


def test_dropout_acts_in_training_alone() -> None:
    shape = {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "vocab_size": 50}
    student = StudentModel(ModelConfig(**shape, dropout=0.5))  # type: ignore[arg-type]
    plain = StudentModel(ModelConfig(**shape))  # type: ignore[arg-type]
    plain.load_state_dict(student.state_dict())
    tokens = torch.randint(0, 50, (1, 8))
    assert not torch.allclose(student(tokens), student(tokens))
    torch.testing.assert_close(student.eval()(tokens), plain(tokens))


def test_rms_norm_normalises_the_mean_square_and_keeps_the_mean() -> None:
    x = torch.tensor([[3.0, 3.0, 3.0, 3.0]])
    torch.testing.assert_close(RMSNorm(4, eps=0.0)(x), torch.ones(1, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 510}, "hidden_size=510 must be divisible by num_heads=8"),
        ({"num_kv_heads": 3}, "num_heads=8 must be divisible by num_kv_heads=3"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must lie in"),
        ({"head_dim": 0}, "head_dim=0 must be at least 1"),
        ({"head_dim": 65}, "head_dim = 65 must be even"),
        ({"hidden_size": 510, "head_dim": 64}, "unless head_dim is a number and qk_norm is true"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        ModelConfig(**changes)  # type: ignore[arg-type]


def test_row_longer_than_the_context_is_refused() -> None:
    student = StudentModel(ModelConfig(hidden_size=16, num_heads=2, vocab_size=9, max_seq_len=8))
    with pytest.raises(ParamsError, match="9 tokens exceeds the student's max_seq_len=8"):
        student(torch.zeros(1, 9, dtype=torch.int64))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "gpt2", "'gpt2' model"),
        ("hidden_act", "gelu", "hidden_act='gelu'"),
        ("mlp_bias", True, "mlp_bias=True"),
    ],
)
def test_variants_not_implemented_are_named(
    key: str, value: object, message: str, tmp_path: Path
) -> None:
    hugging_face("llama", True).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
    with pytest.raises(DecantError, match=message):
        load_student(tmp_path)


def test_stored_frequencies_of_older_llamas_are_passed_over(tmp_path: Path) -> None:
    theirs = hugging_face("llama", False)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.randint(0, 257, (1, 12))
    torch.testing.assert_close(
        load_student(tmp_path)(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"config\.json must hold a JSON object"),
        ('{"model_type": "llama"}', r"config\.json lacks hidden_size"),
    ],
)
def test_config_without_what_it_needs_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(DecantError, match=message):
        read_config(tmp_path)


def test_damaged_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DecantError, match="cannot be read as a model"):
        load_student(tmp_path)
    hugging_face("llama", True).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(DecantError, match="holds no"):
        load_student(tmp_path)
