"""The golden reference: transformers.pipeline, and the loop that is equivalent to it.

Generation repeats three steps: tokenize (once), forward, and choose the next id from the last
position's logits. The loop here keeps no cache, so it forwards all tokens each time. With the same
seed it must give exactly the pipeline's ids, greedy and sampled, with Hugging Face's model as well
as with ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline.runtime.optional import import_transformers
from pipeline.study.section import Comparison, Section, Table, compare, compare_tokens
from pipeline.study.subject import Subject

_SETTINGS = {"greedy": False, "sampled": True}


def reference(subject: Subject) -> Section:
    """Generate study.max_new_tokens tokens by the pipeline and by the explicit loop."""
    models: dict[str, Callable[[Tensor], Tensor]] = {
        "Hugging Face's model": lambda tokens: subject.theirs(tokens, use_cache=False).logits
    }
    if not subject.unsupported:
        models["our model"] = subject.ours
    rows: list[tuple[object, ...]] = []
    comparisons: list[Comparison] = []
    margins: list[float] = []
    for setting, do_sample in _SETTINGS.items():
        golden = _by_pipeline(subject, do_sample)
        rows.append((setting, "transformers.pipeline", _shown(subject, golden)))
        for name, forward in models.items():
            ids, margin = generate_plainly(forward, subject, do_sample)
            rows.append((setting, f"loop, {name}", _shown(subject, ids)))
            comparisons.append(compare_tokens(f"{setting}: loop, {name}", ids, golden))
            margins += [] if do_sample else [margin]
    if "our model" in models:
        expected = models["Hugging Face's model"](subject.prompt)
        comparisons.append(compare("logits of the prompt", subject.ours(subject.prompt), expected))
    return Section(
        "reference",
        "Golden reference",
        prose=[
            f"{len(subject.prompt_ids)} tokens of prompt, then at most "
            f"{subject.params.max_new_tokens} new ones: greedy, and sampled at temperature "
            f"{subject.params.temperature:g} with "
            f"seed {subject.seed}. A difference counts ids that are not equal.",
            f"The closest call in the greedy loop: the best logit was {min(margins):.2g} above the "
            "second. Were it near 1e-5, rounding could decide it.",
        ],
        texts=[("The prompt", subject.params.prompt)],
        tables=[Table("What came out", ("setting", "by", "new text"), rows)],
        comparisons=comparisons,
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


def _shown(subject: Subject, ids: list[int]) -> str:
    return repr(subject.tokenizer.decode(ids))
