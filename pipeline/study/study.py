"""The parts of the study in the order of the report, and the loop that runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pipeline.study.architecture import architecture, tensors
from pipeline.study.compare_tokenizer import tokenizer
from pipeline.study.comparison import Part
from pipeline.study.components import gqa, layer, rmsnorm, rope, swiglu
from pipeline.study.generation_loops import cache, reference
from pipeline.study.speed import speed
from pipeline.study.subject import Subject

PARTS: dict[str, Callable[[Subject], Part]] = {
    "reference": reference,
    "architecture": architecture,
    "tensors": tensors,
    "tokenizer": tokenizer,
    "layer": layer,
    "rmsnorm": rmsnorm,
    "rope": rope,
    "gqa": gqa,
    "swiglu": swiglu,
    "cache": cache,
    "speed": speed,
}

_WITHOUT_OURS = ("reference", "architecture", "tensors", "tokenizer")
"""Parts that apply to any model; the others compare our components with Hugging Face's."""


def run_parts(subject: Subject, names: Sequence[str]) -> Iterator[Part]:
    """Yield the results of the named parts in the report's order, as soon as each is ready.

    If our model does not implement the studied one, the parts that need ours say so and compare
    nothing.
    """
    for name, part in PARTS.items():
        if name not in names:
            continue
        if subject.unsupported and name not in _WITHOUT_OURS:
            yield Part(name=name, title=name, notes=[f"Left out: {subject.unsupported}."])
        else:
            yield part(subject)
