"""The parts of the study in the order of the report, and the loop that runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pipeline.study.architecture import architecture
from pipeline.study.cache import cache
from pipeline.study.compare_rope import rope
from pipeline.study.compare_tokenizer import tokenizer
from pipeline.study.gqa import gqa
from pipeline.study.huggingface_reference import reference
from pipeline.study.layer import layer
from pipeline.study.rmsnorm import rmsnorm
from pipeline.study.section import Section
from pipeline.study.speed import speed
from pipeline.study.subject import Subject
from pipeline.study.swiglu import swiglu
from pipeline.study.tensors import tensors

PARTS: dict[str, Callable[[Subject], Section]] = {
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


def run_parts(subject: Subject, names: Sequence[str]) -> Iterator[Section]:
    """Yield the sections of the named parts in the report's order, as soon as each is ready.

    If our model does not implement the studied one, the parts that need ours say so and compare
    nothing.
    """
    for name, part in PARTS.items():
        if name not in names:
            continue
        if subject.unsupported and name not in _WITHOUT_OURS:
            yield Section(name, name, prose=[f"Left out: {subject.unsupported}."])
        else:
            yield part(subject)
