"""Which families of docs/architectures.md transformers can divide; docs/teachers.md names the rest.

Slow: every family is opened by two ranks in each way, and compared with one process.
"""

from __future__ import annotations

import json
import re
import warnings
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers.utils import logging

from pipeline.errors import DecantError
from pipeline.model.attention_mask import document_positions
from pipeline.runtime.ranks import Ranks, join_ranks
from pipeline.teacher.sharded import Parallel, _Compute, _Open, _Part, choose_parallel
from pipeline.teacher.transformers import HuggingFaceTeacher
from tests.model.architectures import FAMILIES, VOCABULARY, make_family
from tests.training.ranks import run_ranks

PAGE = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text(encoding="utf-8")
REFUSED = {"modernbert-decoder"}  # by one process too
TOGETHER = 12  # families per pair of ranks; each model opens process groups, which keep threads


def outcome(folder: Path, way: Parallel, ranks: Ranks) -> str:
    """Open a family's model divided, and compare its states; the same calls on all ranks."""
    try:
        request = _Open(folder=folder, dtype=torch.float32, vocab_size=VOCABULARY, parallel=way)
        part = _Part(request, ranks)
        part.head()
        tokens = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
        doc_ids = torch.tensor([0] * 5 + [1] * 12 + [2] * 7).expand(2, -1)
        positions = document_positions(doc_ids) if part.keeps_apart else None
        states = part.compute(_Compute(tokens=tokens, positions=positions))
    except DecantError as error:
        return str(error)
    if ranks.rank:
        return ""
    alone = HuggingFaceTeacher(
        folder, vocab_size=VOCABULARY, dtype=torch.float32, device=ranks.device
    )
    wanted = alone.hidden_states(tokens, doc_ids if part.keeps_apart else None)
    error = float((states - wanted).norm() / wanted.norm())
    return "" if error < 1e-5 else f"wrong by {error:.1e}"


def compare_families(work: Path, kinds: list[str]) -> None:
    """Write {family: {way: what went wrong, or nothing}} to a file."""
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    found: dict[str, dict[str, str]] = {}
    with join_ranks("cpu") as ranks:
        for kind in kinds:
            if ranks.rank == 0:
                make_family(work / kind, kind)
            dist.barrier()
            auto = choose_parallel(work / kind, "auto", 2)
            ways: tuple[Parallel, ...] = ("tensor", "fsdp") if auto == "tensor" else ("fsdp",)
            found[kind] = {way: outcome(work / kind, way, ranks) for way in ways}
        if ranks.rank == 0:
            (work / "found.json").write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, len(FAMILIES), TOGETHER))
def test_the_page_names_what_cannot_be_divided(
    start: int, tmp_path: Path, forkserver: ForkServerContext
) -> None:
    kinds = list(FAMILIES)[start : start + TOGETHER]
    run_ranks(forkserver, 2, compare_families, tmp_path, kinds)
    found = json.loads((tmp_path / "found.json").read_text())
    for way in ("tensor", "fsdp"):
        (line,) = re.findall(rf"^- not by `{way}`: (.*)\.$", PAGE, re.MULTILINE)
        said = set(re.findall(r"`([^`]+)`", line))
        errors = {kind: ways[way] for kind, ways in found.items() if ways.get(way)}
        assert {kind: e for kind, e in errors.items() if e.startswith("wrong")} == {}
        assert set(errors) - REFUSED == said & set(kinds), errors
