"""Choose the next tokens, greedily or by drawing, over a KV cache, for rows of different lengths.

The steps are: the model's logits at the last position, in float32 -> repetition penalty ->
temperature -> top-k -> top-p -> softmax -> one draw. Greedy decoding takes the largest logit after
the penalty. These are Hugging Face's filters in Hugging Face's order (`_get_logits_processor` in
its generation/utils.py), drawn by the same `torch.multinomial`, so the same seed gives the same
tokens (tests/generation/test_sampling.py). There is one difference: padding is not text, so the
repetition penalty ignores it, and the result for a row is the same as for the row alone.

`torch.multinomial` draws for a whole batch, so what it draws for a row depends on the other rows.
Rollouts must not depend on the batch, so they bring a random number for each row and step
(`uniforms`), which chooses the token by inversion of the cumulative probabilities.

`pipeline/generation/text_generator.py` converts text to tokens and back.

Shapes: B batch, L padded prompt, T tokens so far, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import ParamsError
from pipeline.generation.decode import DecodeStep
from pipeline.model.decoder import StudentModel
from pipeline.model.kv_cache import KVCache
from pipeline.targets.block_search import sample_by_inversion

ENDED = -1
"""The value in place of the next token for a row that has ended."""

_COLDEST = 0.01
"""Below this, logits / temperature may overflow float32, and only the greedy token is drawn."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """The settings for choosing tokens; None means that a setting was not given, and is off.

    Attributes:
        max_new_tokens: maximum number of new tokens per text, at least 1.
        temperature: logits are divided by it; 0 is greedy, and top_k and top_p then have no effect.
        top_k: number of most probable ids that may be drawn; 0 for all.
        top_p: share of the mass held by the most probable ids that may be drawn; 1 for all.
        repetition_penalty: factor that lowers the logits of ids already in the text; 1 for none.
        eos_ids: ids that end a text; empty for none.
        num_ids: ids from this one on are never chosen: rows of the head beyond the tokenizer's ids.
        seed: seed of the draws.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    eos_ids: tuple[int, ...] | None = None
    num_ids: int | None = None
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
    """Make the ids [B, T] less probable in the logits [B, V].

    A positive logit is divided by the penalty, a negative one is multiplied by it.

    This is Keskar et al. 2019, section 4.1, made sign-aware as in Hugging Face, since dividing a
    negative logit would reward it. An id that occurs several times is penalised once.
    """
    seen = logits.gather(1, ids)
    return logits.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set logits [B, V] below each row's k-th largest to -inf (Fan et al. 2018, section 5.4)."""
    smallest = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Set logits [B, V] outside the smallest set of ids that holds the mass p to -inf.

    This set is the nucleus (Holtzman et al. 2020, eq. 2): an id stays if the more probable ids hold
    less than p. The most probable id always stays.
    """
    rising, order = logits.sort()
    outside = rising.softmax(-1).cumsum(-1) <= 1 - p  # from the least probable on, like HF
    outside[:, -1] = False
    return logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)


def filter_logits(logits: Tensor, ids: Tensor, settings: GenerationSettings) -> Tensor:
    """Return the logits [B, V] to draw from; -inf for ids that may not be drawn.

    Args:
        logits: float32 [B, V].
        ids: int64 [B, T], the text so far; padding repeats an id from its own row.
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
    logits: Tensor, ids: Tensor, settings: GenerationSettings, draws: torch.Generator | Tensor
) -> Tensor:
    """Choose the next token of each row, int64 [B].

    Args:
        draws: a random generator, or one number in [0, 1) for each row, float64 [B].
    """
    logits = filter_logits(logits[:, : settings.num_ids].float(), ids, settings)
    if not settings.temperature:
        return logits.argmax(-1)
    probabilities = logits.softmax(-1)
    if isinstance(draws, Tensor):
        return sample_by_inversion(probabilities, draws[:, None])[:, 0]
    return torch.multinomial(probabilities, 1, generator=draws)[:, 0]


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad prompts to int64 [B, L]; also return a mask [B, L], False at padding.

    Padding repeats the row's first token, so no padding token is needed, and the repetition penalty
    never takes one for text.
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
    uniforms: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every row, int64 [B] on the CPU, step by step; ENDED after an eos.

    It stops after `max_new_tokens` steps, or once all rows have ended. The eos itself is yielded.

    Args:
        student: model in evaluation mode.
        prompts: token ids of the prompts, of any lengths, none empty.
        settings: a setting that is None is off: greedy, no filters, no eos.
        draws: random generator on the model's device; None starts one with settings.seed.
        ends: function that gets each step and returns which texts it ends, bool [B] on the CPU. If
            given, rows that have ended leave the batch and cost nothing more. Otherwise they stay
            and tokens are drawn for them, as in Hugging Face's generate; without this, the draws
            for the other rows would differ from it.
        uniforms: float64 [B, max_new_tokens] in [0, 1), which choose the tokens in place of
            `draws`. What is drawn for a row then depends on that row alone, and rows that have
            ended leave the batch.
    """
    device = student.head_weight.device
    tokens, real = pad_left(prompts, device)
    (num_rows, prompt_len), most = tokens.shape, settings.max_new_tokens
    cache = student.new_cache(num_rows, prompt_len + most - 1, real)  # the last token is never read
    ids = torch.cat((tokens, tokens.new_zeros(num_rows, most)), 1)
    draws = draws or torch.Generator(device).manual_seed(settings.seed)
    eos = torch.tensor(settings.eos_ids or (), dtype=torch.int64)
    ended = torch.zeros(num_rows, dtype=torch.bool)  # on the CPU, which thus waits once per step
    rows = torch.arange(num_rows)  # the rows still in the batch
    logits = _prefill(student, tokens, cache)
    read = DecodeStep(student, cache)
    may_leave = ends is not None or uniforms is not None
    for end in range(prompt_len, prompt_len + most):
        chance = draws if uniforms is None else uniforms[rows, end - prompt_len].to(device)
        chosen = choose(logits, ids[:, :end], settings, chance)
        found = chosen.cpu()
        step = torch.full((num_rows,), ENDED)
        step[rows] = found.masked_fill(ended, ENDED)
        yield step
        if len(eos):
            ended |= torch.isin(found, eos)
        if ends is not None:
            ended |= ends(step)[rows]
        if bool(ended.all()):
            return
        if may_leave and bool(ended.any()):
            left = (~ended).nonzero()[:, 0]
            rows, ended = rows[left], ended[left]
            left = left.to(device)
            cache.keep(left)
            chosen, ids = chosen[left], ids[left]
        if end + 1 < prompt_len + most:
            ids[:, end] = chosen
            logits = read(chosen)


@torch.inference_mode()
def _prefill(student: StudentModel, tokens: Tensor, cache: KVCache) -> Tensor:
    """Read the prompts [B, L]; return the logits [B, V] of the next token.

    The head is applied to the last position only: the logits of a whole prompt would be L x V
    numbers, of which only one row is needed.
    """
    last = student.hidden_states(tokens, cache=cache)[:, -1]
    logits: Tensor = student.lm_head(last)
    return logits


def generate_ids(
    student: StudentModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    draws: torch.Generator | None = None,
    uniforms: Tensor | None = None,
) -> list[list[int]]:
    """Return the new tokens of each prompt, with a closing eos; see `decode_steps`."""
    texts: list[list[int]] = [[] for _ in prompts]
    for step in decode_steps(student, prompts, settings, draws, uniforms=uniforms):
        for text, token in zip(texts, step.tolist(), strict=True):
            if token != ENDED:
                text.append(token)
    return texts
