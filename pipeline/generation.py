"""Which token comes next: greedy or drawn, over a KV cache, for rows of different lengths.

A step is: the model's logits at the last position, in float32 -> repetition penalty -> temperature
-> top-k -> top-p -> softmax -> one draw; greedy takes the largest after the penalty. These are
Hugging Face's filters in Hugging Face's order (`_get_logits_processor` in its generation/utils.py),
drawn by the same `torch.multinomial`, so that the same seed gives the same tokens
(tests/test_generation.py). One thing is left out of theirs: padding is not text, so the
repetition penalty does not look at it, and a row comes out as it would alone.

Text in and out is `pipeline/text_generator.py`'s.

Shapes: B batch, L padded prompt, T tokens so far, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import ParamsError
from pipeline.model.decode import DecodeStep
from pipeline.model.kv_cache import KVCache
from pipeline.model.student import StudentModel

ENDED = -1
"""Stands for the next token of a row whose text has ended."""

_COLDEST = 0.01
"""Below, logits / temperature may leave float32, and nothing but the greedy token is drawn."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How tokens are chosen; None is for what nobody chose, which is off.

    Attributes:
        max_new_tokens: at most so many a text, at least 1.
        temperature: logits are divided by it; 0 is greedy, and top_k and top_p then play no part.
        top_k: only so many most probable ids may be drawn; 0 for all.
        top_p: only the most probable ids that hold this share of the mass; 1 for all.
        repetition_penalty: logits of ids that the text holds already lose by it; 1 for none.
        eos_ids: ids that end a text; empty for none.
        seed: of the draws.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    eos_ids: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "be at least 1"),
            "temperature": (
                not self.temperature or self.temperature >= _COLDEST,
                f"be 0, which is greedy, or at least {_COLDEST}",
            ),
            "top_k": ((self.top_k or 0) >= 0, "be at least 0"),
            "top_p": (self.top_p is None or 0.0 < self.top_p <= 1.0, "lie in (0, 1]"),
            "repetition_penalty": (
                self.repetition_penalty is None or self.repetition_penalty > 0.0,
                "be above 0",
            ),
        }
        for name, (met, limit) in limits.items():
            if not met:
                raise ParamsError(f"{name}={getattr(self, name)} must {limit}")


def penalise_repetition(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Logits [B, V] of ids [B, T] divided by the penalty if positive, else multiplied by it.

    Keskar et al. 2019, section 4.1, made sign-aware as in Hugging Face: dividing a negative logit
    would reward it. An id that repeats is penalised once.
    """
    seen = logits.gather(1, ids)
    return logits.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits [B, V], -inf below the k-th largest of each row (Fan et al. 2018, section 5.4)."""
    smallest = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits [B, V], -inf outside the smallest set of ids that holds the mass p.

    The nucleus (Holtzman et al. 2020, eq. 2): an id stays while those more probable hold less than
    p. The most probable always stays.
    """
    rising, order = logits.sort()
    outside = rising.softmax(-1).cumsum(-1) <= 1 - p  # from the least probable on, as Hugging Face
    outside[:, -1] = False
    return logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)


def filter_logits(logits: Tensor, ids: Tensor, settings: GenerationSettings) -> Tensor:
    """The logits [B, V] that are drawn from; -inf for what may not be.

    Args:
        logits: float32 [B, V].
        ids: int64 [B, T], the text so far; padding repeats an id of its own row.
    """
    if settings.repetition_penalty not in (None, 1.0):
        assert settings.repetition_penalty is not None
        logits = penalise_repetition(logits, ids, settings.repetition_penalty)
    if not settings.temperature:
        return logits
    logits = logits / settings.temperature
    if settings.top_k:
        logits = keep_top_k(logits, settings.top_k)
    if settings.top_p is not None and settings.top_p < 1.0:
        logits = keep_top_p(logits, settings.top_p)
    return logits


@torch.inference_mode()
def choose(
    logits: Tensor, ids: Tensor, settings: GenerationSettings, draws: torch.Generator
) -> Tensor:
    """The next token of each row, int64 [B]."""
    logits = filter_logits(logits.float(), ids, settings)
    if not settings.temperature:
        return logits.argmax(-1)
    return torch.multinomial(logits.softmax(-1), 1, generator=draws)[:, 0]


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as int64 [B, L] and a mask [B, L], False at padding.

    Padding repeats the row's first token, so that no padding token is needed and none is ever
    taken for text by the repetition penalty.
    """
    longest = max(map(len, prompts))
    padded = [[prompt[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    real = [[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    return torch.tensor(padded, device=device), torch.tensor(real, device=device)


def decode_steps(
    student: StudentModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    draws: torch.Generator | None = None,
    ends: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Tensor]:
    """The next token of every row, int64 [B] on the CPU, a step at a time; ENDED behind an eos.

    Stops after `max_new_tokens` steps, or once all rows have ended. An eos is yielded.

    Args:
        student: in evaluation mode.
        prompts: token ids, none empty, of any lengths.
        settings: what is None is off: greedy, no filters, no eos.
        draws: where chance comes from, on the model's device; None starts one at settings.seed.
        ends: is shown each step and says whose text it ends, bool [B] on the CPU. Then rows that
            have ended leave the batch and cost no more; without, they stay and are drawn for, as
            in Hugging Face's generate, whose draws for the others would else differ.
    """
    device = student.head_weight.device
    tokens, real = pad_left(prompts, device)
    (num_rows, prompt_len), most = tokens.shape, settings.max_new_tokens
    cache = student.new_cache(num_rows, prompt_len + most - 1, real)  # the last is never read
    ids = torch.cat((tokens, tokens.new_zeros(num_rows, most)), 1)
    draws = draws or torch.Generator(device).manual_seed(settings.seed)
    eos = torch.tensor(settings.eos_ids or (), dtype=torch.int64, device=device)
    ended = torch.zeros(num_rows, dtype=torch.bool, device=device)
    rows = torch.arange(num_rows)  # those in the batch
    logits = _prefill(student, tokens, cache)
    read = DecodeStep(student, cache)
    for end in range(prompt_len, prompt_len + most):
        chosen = choose(logits, ids[:, :end], settings, draws)
        step = torch.full((num_rows,), ENDED)
        step[rows] = chosen.masked_fill(ended, ENDED).cpu()
        yield step
        if len(eos):
            ended |= torch.isin(chosen, eos)
        if ends is not None:
            ended |= ends(step)[rows].to(device)
        if bool(ended.all()):
            return
        if ends is not None and bool(ended.any()):
            left = (~ended).nonzero()[:, 0]
            cache.keep(left)
            rows, chosen, ids, ended = rows[left.cpu()], chosen[left], ids[left], ended[left]
        if end + 1 < prompt_len + most:
            ids[:, end] = chosen
            logits = read(chosen)


@torch.inference_mode()
def _prefill(student: StudentModel, tokens: Tensor, cache: KVCache) -> Tensor:
    """Read the prompts [B, L]; logits [B, V] of what follows, the head at the last position only.

    A whole prompt's logits would be L x V numbers, of which one row is looked at.
    """
    last = student.hidden_states(tokens, cache=cache)[:, -1]
    logits: Tensor = student.lm_head(last)
    return logits


def generate_ids(
    student: StudentModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    draws: torch.Generator | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, a closing eos included; see `decode_steps`."""
    texts: list[list[int]] = [[] for _ in prompts]
    for step in decode_steps(student, prompts, settings, draws):
        for text, token in zip(texts, step.tolist(), strict=True):
            if token != ENDED:
                text.append(token)
    return texts
