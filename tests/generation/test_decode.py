"""The written-out step for one token against the student, a module at a time."""

from __future__ import annotations

import pytest
import torch

from pipeline.generation.decode import DecodeStep, product
from pipeline.model.decoder import ModelConfig, StudentModel
from pipeline.model.rope import YarnScaling

TIGHT = {"atol": 1e-5, "rtol": 1e-5}
YARN = YarnScaling(factor=4.0, original_max_position_embeddings=16)


def make_student(**changes: object) -> StudentModel:
    shape = {
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 71,
        "max_seq_len": 64,
    }
    model = StudentModel(ModelConfig(**(shape | changes))).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("lengths", [[6], [6, 3, 5], [1, 1]])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": False, "tie_embeddings": False},
        {"rope_scaling": YARN},
        {"attention_bias": False, "qk_norm": True, "head_dim": 12},
    ],
)
@torch.no_grad()
def test_steps_equal_the_student(lengths: list[int], changes: dict[str, object]) -> None:
    student = make_student(**changes)
    longest = max(lengths)
    tokens = torch.randint(0, 71, (len(lengths), longest))
    real = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    plain, fast = (student.new_cache(len(lengths), longest + 20, real) for _ in range(2))
    student(tokens, cache=plain)
    student(tokens, cache=fast)
    step = DecodeStep(student, fast)
    for new in torch.randint(0, 71, (20, len(lengths))):
        expected = student(new[:, None], cache=plain)[:, 0]
        torch.testing.assert_close(step(new), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fast.tensor, plain.tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 5])
@torch.no_grad()
def test_bfloat16_steps_round_no_more_than_the_student(rows: int) -> None:
    exact = make_student()
    half = make_student()
    half.load_state_dict(exact.state_dict())
    half.to(torch.bfloat16)
    exact.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
    tokens, new = torch.randint(0, 71, (rows, 9)), torch.randint(0, 71, (rows, 1))
    expected = exact(torch.cat((tokens, new), 1))[:, -1]
    caches = [half.new_cache(rows, 10) for _ in range(2)]
    for cache in caches:
        half(tokens, cache=cache)
    ours = DecodeStep(half, caches[0])(new[:, 0]).float() - expected
    theirs = half(new, cache=caches[1])[:, 0].float() - expected
    assert ours.square().mean() < 1.5 * theirs.square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [2, 40])
def test_product_adds_a_bias_or_rows(dtype: torch.dtype, rows: int) -> None:
    x, weight = torch.randn(rows, 8).to(dtype), torch.randn(6, 8).to(dtype)
    bias, residual = torch.randn(6).to(dtype), torch.randn(rows, 6).to(dtype)
    tolerance = {"atol": 0.1, "rtol": 0.02} if dtype == torch.bfloat16 else TIGHT
    plain = x.double() @ weight.double().T
    for add in (None, bias, residual):
        expected = plain if add is None else plain + add.double()
        torch.testing.assert_close(product(x, weight, add=add).double(), expected, **tolerance)
    for add in (None, bias):
        expected = plain[0] if add is None else plain[0] + add.double()
        torch.testing.assert_close(product(x[0], weight, add=add).double(), expected, **tolerance)


def test_adapters_are_not_passed_over() -> None:
    class Adapted(torch.nn.Linear):
        pass

    student = make_student()
    student.model.layers[1].mlp.up_proj = Adapted(32, 48)
    with pytest.raises(AssertionError, match="merged"):
        DecodeStep(student, student.new_cache(1, 4))
