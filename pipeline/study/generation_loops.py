"""Generation by explicit loops, without and with a KV cache, against Hugging Face's own.

With the same seed, a loop must give exactly the ids of `transformers.pipeline` or `generate`,
greedy and sampled, with Hugging Face's model as well as with ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline.generation.sampling import GenerationSettings, generate_ids
from pipeline.model.kv_cache import KVCache
from pipeline.runtime.optional import import_transformers
from pipeline.study.comparison import Comparison, Part, compare, compare_sequences, shape_of
from pipeline.study.subject import Subject


def reference(subject: Subject) -> Part:
    """Generate study.max_new_tokens tokens by the pipeline and by the explicit loop."""
    models: dict[str, Callable[[Tensor], Tensor]] = {
        "Hugging Face's model": lambda tokens: subject.theirs(tokens, use_cache=False).logits
    }
    if not subject.unsupported:
        models["our model"] = subject.ours
    rows: list[tuple[object, ...]] = [("setting", "by", "new text")]
    comparisons: list[Comparison] = []
    margins: list[float] = []
    for setting, do_sample in {"greedy": False, "sampled": True}.items():
        golden = _by_pipeline(subject, do_sample)
        rows.append((setting, "transformers.pipeline", repr(subject.tokenizer.decode(golden))))
        for name, forward in models.items():
            ids, margin = generate_plainly(forward, subject, do_sample)
            rows.append((setting, f"loop, {name}", repr(subject.tokenizer.decode(ids))))
            comparisons.append(compare_sequences(f"{setting}: loop, {name}", ids, golden))
            margins += [] if do_sample else [margin]
    if "our model" in models:
        expected = models["Hugging Face's model"](subject.prompt)
        comparisons.append(compare("logits of the prompt", subject.ours(subject.prompt), expected))
    return Part(
        name="reference",
        title="Golden reference",
        notes=[
            f"{len(subject.prompt_ids)} tokens of prompt, then at most "
            f"{subject.params.max_new_tokens} new ones: greedy, and sampled at temperature "
            f"{subject.params.temperature:g} with seed {subject.seed}. A difference counts ids "
            "that are not equal.",
            f"The closest call in the greedy loop: the best logit was {min(margins):.2g} above the "
            "second. Were it near 1e-5, rounding could decide it.",
        ],
        comparisons=comparisons,
        texts={"The prompt": subject.params.prompt},
        tables={"Generated text": rows},
    )


@torch.no_grad()
def generate_plainly(
    forward: Callable[[Tensor], Tensor], subject: Subject, do_sample: bool
) -> tuple[list[int], float]:
    """Run the explicit loop: tokens int64 [1, L] -> logits [1, L, V] -> next id, and repeat.

    Returns:
        The new ids, and the smallest distance between the two best logits in any step.
    """
    torch.manual_seed(subject.seed)
    tokens, margin = subject.prompt, float("inf")
    for _ in range(subject.params.max_new_tokens):
        logits = forward(tokens)[:, -1].float()  # [1, V]
        best, second = logits[0].topk(2).values.tolist()
        margin = min(margin, best - second)
        if do_sample:
            probabilities = (logits / subject.params.temperature).softmax(-1)
            chosen = torch.multinomial(probabilities, 1)
        else:
            chosen = logits.argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, chosen), dim=1)
        if int(chosen) in subject.end_ids:
            break
    return tokens[0, len(subject.prompt_ids) :].tolist(), margin


def _by_pipeline(subject: Subject, do_sample: bool) -> list[int]:
    pipe: Any = import_transformers().pipeline(
        "text-generation",
        model=subject.theirs,
        tokenizer=subject.tokenizer,
        device=subject.device,
    )
    sampling = {"temperature": subject.params.temperature, "top_k": 0} if do_sample else {}
    torch.manual_seed(subject.seed)
    output = pipe(
        subject.params.prompt,
        max_new_tokens=subject.params.max_new_tokens,
        do_sample=do_sample,
        return_tensors=True,
        **sampling,
    )
    ids: list[int] = output[0]["generated_token_ids"]
    return ids[len(subject.prompt_ids) :]


@torch.no_grad()
def cache(subject: Subject) -> Part:
    """Prefill and decode by hand with both caches, and compare with Hugging Face's `generate`."""
    prompt, steps = subject.prompt, subject.params.max_new_tokens
    golden = subject.theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=steps, do_sample=False
    )[0, prompt.shape[1] :].tolist()
    their_ids, their_cache, shapes = _their_loop(subject, len(golden))
    ours, logits, our_cache = _our_loop(subject, len(golden))
    settings = GenerationSettings(max_new_tokens=steps, eos_ids=tuple(subject.end_ids))
    (generated,) = generate_ids(subject.ours, [subject.prompt_ids], settings)
    read = torch.tensor([[*subject.prompt_ids, *ours[:-1]]], device=subject.device)
    filled = our_cache.tensor[:, :, :, :, : our_cache.length]
    keys = torch.stack([layer.keys for layer in their_cache.layers])
    values = torch.stack([layer.values for layer in their_cache.layers])
    per_token = filled.nbytes // our_cache.length
    return Part(
        name="cache",
        title="KV cache",
        notes=[
            "Ours is one tensor [layer, 0 key or 1 value, batch, key/value head, position, "
            f"dimension], allocated before the first token: {shape_of(our_cache.tensor)} here. "
            "Hugging Face's is a list of layers, whose keys and values [batch, key/value head, "
            "position, dimension] grow by concatenation: cache.tensor[l, 0, b, g, p] is "
            f"cache.layers[l].keys[b, g, p]. A token takes {per_token:,} bytes in float32.",
        ],
        comparisons=[
            compare_sequences(
                "Hugging Face's loop by hand against its generate", their_ids, golden
            ),
            compare_sequences("our loop by hand against its generate", ours, golden),
            compare_sequences("our generator against its generate", generated, golden),
            compare("keys of all layers, at the end", filled[:, 0], keys),
            compare("values of all layers, at the end", filled[:, 1], values),
            compare("logits with the cache against without, ours", logits, subject.ours(read)),
        ],
        tables={
            "Hugging Face's keys, layer by layer (values are alike)": [
                ("layer", "after prefill", "after 1 decode step", "at the end"),
                *((n, at[0], at[min(1, len(at) - 1)], at[-1]) for n, at in enumerate(shapes)),
            ]
        },
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


def _their_loop(subject: Subject, steps: int) -> tuple[list[int], Any, list[tuple[str, ...]]]:
    """Return greedy ids, Hugging Face's cache, and for each layer its keys' shape by step."""
    kept = import_transformers().DynamicCache(config=subject.config)
    tokens, ids, shapes = subject.prompt, [], []
    for _ in range(steps):
        output = subject.theirs(tokens, past_key_values=kept, use_cache=True)
        tokens = output.logits[:, -1:].argmax(-1)
        ids.append(int(tokens))
        shapes.append([shape_of(layer.keys) for layer in kept.layers])
    return ids, kept, list(zip(*shapes, strict=True))
