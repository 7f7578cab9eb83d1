"""Filters, decoding and draws against Hugging Face's generate()."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.errors import ParamsError
from pipeline.generation.sampling import (
    ENDED,
    GenerationSettings,
    decode_steps,
    filter_logits,
    generate_ids,
    keep_top_k,
    keep_top_p,
    pad_left,
    penalise_repetition,
)
from pipeline.model.decoder import StudentModel
from pipeline.model.weights import load_student
from tests.models import hugging_face

PROMPTS = [[5, 9, 200, 31, 8, 8], [7, 8], [100]]  # left padded in a batch


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama"])
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, StudentModel]:
    """Hugging Face's model and ours, of the same weights."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp(request.param)
    theirs = hugging_face(request.param, tied=False)  # tied, it says the same token for ever
    theirs.save_pretrained(folder)  # type: ignore[operator]
    return theirs, load_student(folder).eval()


def their_tokens(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """What generate() adds to a left-padded batch; padding is 0."""
    tokens, real = pad_left(prompts, torch.device("cpu"))
    if options["do_sample"]:
        options = {"top_k": 0} | options  # else 50
    options |= {"pad_token_id": 0, "eos_token_id": None}
    out = model.generate(tokens * real, attention_mask=real.long(), **options)
    return out[:, tokens.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda x, i: penalise_repetition(x, i, 1.7), RepetitionPenaltyLogitsProcessor(1.7)),
        (lambda x, i: penalise_repetition(x, i, 0.6), RepetitionPenaltyLogitsProcessor(0.6)),
        (lambda x, i: keep_top_k(x, 7), TopKLogitsWarper(7)),
        (lambda x, i: keep_top_k(x, 1000), TopKLogitsWarper(1000)),
        (lambda x, i: keep_top_p(x, 0.8), TopPLogitsWarper(0.8)),
        (lambda x, i: keep_top_p(x, 0.001), TopPLogitsWarper(0.001)),
        (
            lambda x, i: filter_logits(x, i, GenerationSettings(temperature=0.3)),
            TemperatureLogitsWarper(0.3),
        ),
    ],
)
def test_each_filter_equals_hugging_face(ours: Any, theirs: LogitsProcessor) -> None:
    ids = torch.randint(0, 50, (3, 12))
    logits = 4 * torch.randn(3, 50)
    logits[0, :9] = logits[0, 3]  # ties
    before = logits.clone()
    assert torch.equal(ours(logits, ids), theirs(ids, logits.clone()))
    assert torch.equal(logits, before)


def test_filters_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert torch.isfinite(keep_top_p(logits, 0.7)).tolist() == [[True, True, False, False]]
    assert torch.isfinite(keep_top_k(logits, 3)).tolist() == [[True, True, True, True]]  # a tie
    penalised = penalise_repetition(torch.tensor([[2.0, -2.0, 2.0]]), torch.tensor([[0, 1, 1]]), 2)
    assert penalised.tolist() == [[1.0, -4.0, 2.0]]


@pytest.mark.parametrize("prompts", [[PROMPTS[0]], PROMPTS])
def test_greedy_equals_generate_token_by_token(
    models: tuple[Any, StudentModel], prompts: list[list[int]]
) -> None:
    theirs, ours = models
    expected = their_tokens(theirs, prompts, do_sample=False, max_new_tokens=30)
    assert generate_ids(ours, prompts, GenerationSettings(max_new_tokens=30)) == expected
    assert len({token for row in expected for token in row}) > 4  # not one token for ever


def test_repetition_penalty_sees_the_row_but_not_its_padding(
    models: tuple[Any, StudentModel],
) -> None:
    theirs, ours = models
    options = {"do_sample": False, "max_new_tokens": 30, "repetition_penalty": 1.4}
    alone = [their_tokens(theirs, [prompt], **options)[0] for prompt in PROMPTS]
    settings = GenerationSettings(max_new_tokens=30, repetition_penalty=1.4)
    assert generate_ids(ours, PROMPTS, settings) == alone
    plain = generate_ids(ours, PROMPTS, GenerationSettings(max_new_tokens=30))
    assert plain != alone


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 0.9, "top_k": 50, "top_p": 0.9},
    ],
)
def test_same_seed_draws_the_tokens_of_generate(
    models: tuple[Any, StudentModel], options: dict[str, Any]
) -> None:
    theirs, ours = models
    torch.manual_seed(11)
    expected = their_tokens(theirs, PROMPTS, do_sample=True, max_new_tokens=25, **options)
    settings = GenerationSettings(max_new_tokens=25, seed=11, **options)
    assert generate_ids(ours, PROMPTS, settings) == expected
    assert generate_ids(ours, PROMPTS, settings) == expected  # whatever the global seed
    other = GenerationSettings(max_new_tokens=25, seed=12, **options)
    assert generate_ids(ours, PROMPTS, other) != expected


def test_all_filters_at_once_leave_the_distribution_of_generate(
    models: tuple[Any, StudentModel],
) -> None:
    theirs, ours = models
    options = {"temperature": 0.8, "top_k": 30, "top_p": 0.85, "repetition_penalty": 1.2}
    ids = torch.tensor([PROMPTS[0]])
    out = theirs.generate(
        ids,
        do_sample=True,
        max_new_tokens=1,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    with torch.inference_mode():
        found = filter_logits(ours(ids)[:, -1], ids, GenerationSettings(**options))
    torch.testing.assert_close(found.softmax(-1), out.scores[0].softmax(-1), atol=1e-6, rtol=1e-4)
    assert 1 < (found > -torch.inf).sum() <= 30


def test_rows_end_at_any_eos_and_the_batch_when_all_have(
    models: tuple[Any, StudentModel],
) -> None:
    _, ours = models
    free = generate_ids(ours, PROMPTS, GenerationSettings(max_new_tokens=12))
    eos = (free[0][3], free[1][6], free[2][1])
    settings = GenerationSettings(max_new_tokens=12, eos_ids=eos)
    cut = [row[: next(i for i, token in enumerate(row) if token in eos) + 1] for row in free]
    assert generate_ids(ours, PROMPTS, settings) == cut
    steps = torch.stack(list(decode_steps(ours, PROMPTS, settings)), 1)
    longest = max(map(len, cut))
    assert steps.shape == (3, longest)
    for row, expected in zip(steps.tolist(), cut, strict=True):
        assert row == expected + [ENDED] * (longest - len(expected))


def test_rows_that_are_ended_leave_the_batch(models: tuple[Any, StudentModel]) -> None:
    """At steps 3, 7 and 7 by `ends`, at an eos besides: the others' tokens are as before."""
    _, ours = models
    free = generate_ids(ours, PROMPTS, GenerationSettings(max_new_tokens=12))
    sizes, shown = [], []

    def ends(step: torch.Tensor) -> torch.Tensor:
        shown.append(step)
        return torch.tensor([len(shown) == 7, len(shown) == 3, False])

    def choose(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(len(logits))
        return logits.argmax(-1)

    settings = GenerationSettings(max_new_tokens=12, eos_ids=(free[2][9],))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.generation.sampling.choose", choose)
        steps = torch.stack(list(decode_steps(ours, PROMPTS, settings, ends=ends)), 1)
    assert torch.equal(steps, torch.stack(shown, 1))
    last = free[2].index(free[2][9]) + 1
    for row, length in enumerate((7, 3, last)):
        expected = free[row][:length]
        if free[2][9] in expected[:-1]:
            expected = expected[: expected.index(free[2][9]) + 1]
        found = [token for token in steps[row].tolist() if token != ENDED]
        assert found == expected
    assert sizes[0] == 3
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1


def test_text_may_fill_the_context_to_the_last_token(models: tuple[Any, StudentModel]) -> None:
    _, ours = models
    assert ours.config.max_seq_len == 64
    assert len(generate_ids(ours, [[1] * 60], GenerationSettings(max_new_tokens=4))[0]) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -0.1}, "temperature=-0.1 must be 0, which is greedy, or at least"),
        ({"temperature": 1e-30}, "temperature=1e-30 must be 0"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p=1.1 must lie in"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be above 0"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        GenerationSettings(**changes)
