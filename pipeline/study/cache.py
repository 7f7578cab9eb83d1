"""The KV cache: its contents after the prompt and after each token, and the loop that fills it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.generation.sampling import GenerationSettings, generate_ids
from pipeline.model.kv_cache import KVCache
from pipeline.runtime.optional import import_transformers
from pipeline.study.section import Picture, Section, Table, compare, compare_tokens
from pipeline.study.subject import Subject


@torch.no_grad()
def cache(subject: Subject) -> Section:
    """Prefill and decode by hand with both caches, and compare with Hugging Face's `generate`."""
    prompt, steps = subject.prompt, subject.params.max_new_tokens
    golden = subject.theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=steps, do_sample=False
    )[0, prompt.shape[1] :].tolist()
    theirs, their_shapes = _their_loop(subject, len(golden))
    ours, logits, our_cache = _our_loop(subject, len(golden))
    their_ids, their_cache = theirs
    settings = GenerationSettings(max_new_tokens=steps, eos_ids=tuple(subject.end_ids))
    (generated,) = generate_ids(subject.ours, [subject.prompt_ids], settings)
    read = torch.tensor([[*subject.prompt_ids, *ours[:-1]]], device=subject.device)
    filled = our_cache.tensor[:, :, :, :, : our_cache.length]
    keys = torch.stack([layer.keys for layer in their_cache.layers])
    values = torch.stack([layer.values for layer in their_cache.layers])
    first = prompt.shape[1]
    return Section(
        "cache",
        "KV cache",
        prose=[
            f"Prefill reads {first} tokens at once; each decode step reads 1 and attends to all "
            "before it. A key is stored rotated, so it never has to be touched again.",
            "Ours is one tensor [layer, 0 key or 1 value, batch, key/value head, position, "
            "dimension], made whole before the first token and filled from the left: "
            f"{_shape(our_cache.tensor)} here. Hugging Face's is a list of layers, each with keys "
            "and values [batch, key/value head, position, dimension], which grow by concatenation: "
            "cache.tensor[l, 0, b, g, p] is cache.layers[l].keys[b, g, p].",
            f"A token takes {_bytes_a_token(subject):,} bytes in float32.",
        ],
        tables=[
            Table(
                "Hugging Face's keys, layer by layer (values are alike)",
                (
                    "layer",
                    "after prefill",
                    "after 1 decode step",
                    "at the end",
                    "bytes, with values",
                ),
                [
                    (number, *shapes, f"{2 * keys[number].nbytes:,}")
                    for number, shapes in enumerate(zip(*their_shapes, strict=True))
                ],
                folded=True,
            ),
            Table(
                "Steps",
                ("step", "reads", "positions", "filled after it"),
                _steps(first, len(golden)),
            ),
        ],
        pictures=[
            Picture(
                "cache",
                "What the cache takes by tokens read, in float32, a sequence.",
                [lambda axes: _draw(axes, subject)],
            )
        ],
        comparisons=[
            compare_tokens("Hugging Face's loop by hand against its generate", their_ids, golden),
            compare_tokens("our loop by hand against its generate", ours, golden),
            compare_tokens("our generator against its generate", generated, golden),
            compare("keys of all layers, at the end", filled[:, 0], keys),
            compare("values of all layers, at the end", filled[:, 1], values),
            compare("logits with the cache against without, ours", logits, subject.ours(read)),
        ],
    )


def _our_loop(subject: Subject, steps: int) -> tuple[list[int], Tensor, KVCache]:
    """Return greedy ids, the logits of every position read [1, S, V], and the cache."""
    kept = subject.ours.new_cache(1, len(subject.prompt_ids) + steps)
    tokens, ids, logits = subject.prompt, [], []
    for _ in range(steps):
        logits.append(subject.ours(tokens, cache=kept))
        tokens = logits[-1][:, -1:].argmax(-1)
        ids.append(int(tokens))
    return ids, torch.cat(logits, 1), kept


def _their_loop(
    subject: Subject, steps: int
) -> tuple[tuple[list[int], Any], tuple[list[str], list[str], list[str]]]:
    """Return greedy ids, Hugging Face's cache, and its keys' shapes at three points.

    The points are after prefill, after one more step and at the end.
    """
    kept = import_transformers().DynamicCache(config=subject.config)
    tokens, ids, shapes = subject.prompt, [], []
    for _ in range(steps):
        output = subject.theirs(tokens, past_key_values=kept, use_cache=True)
        tokens = output.logits[:, -1:].argmax(-1)
        ids.append(int(tokens))
        shapes.append([_shape(layer.keys) for layer in kept.layers])
    return (ids, kept), (shapes[0], shapes[min(1, steps - 1)], shapes[-1])


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def _steps(prompt: int, steps: int) -> list[tuple[object, ...]]:
    """Return rows for prefill, the first decode steps, and the last."""
    rows: list[tuple[object, ...]] = [
        ("prefill", prompt, f"0 to {prompt - 1}", prompt),
    ]
    shown = sorted({*range(1, min(4, steps)), steps - 1} - {0})
    rows += [(f"decode {n}", 1, prompt + n - 1, prompt + n) for n in shown]
    return rows


def _bytes_a_token(subject: Subject, heads: int | None = None) -> int:
    """Return bytes per token for keys and values of all layers in float32, `heads` per layer."""
    config = subject.our_config
    return 2 * config.num_layers * (heads or config.num_kv_heads) * config.head_size * 4


def _draw(axes: Any, subject: Subject) -> None:
    config = subject.our_config
    lengths = torch.linspace(0, config.max_seq_len, 50)
    shared = {f"{config.num_kv_heads} key/value heads": config.num_kv_heads}
    for (label, heads), colour in zip(
        (shared | {f"one for each of {config.num_heads} query heads": config.num_heads}).items(),
        ("#2f7de1", "#8a8f98"),
        strict=False,
    ):
        axes.plot(
            lengths, lengths * _bytes_a_token(subject, heads) / 1e6, label=label, color=colour
        )
    axes.set_xlabel("tokens read")
    axes.set_ylabel("MB")
