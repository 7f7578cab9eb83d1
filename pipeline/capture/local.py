"""Capture in this process: the missing shards of each split, or a part of them (`--shards I/N`)."""

from __future__ import annotations

from pipeline.capture.capture import Capture, CaptureResult, lock_cache, open_captures, say_repaired
from pipeline.config.params import Params
from pipeline.runtime.console import announce


def capture_locally(
    params: Params,
    *,
    part: int = 1,
    parts: int = 1,
    overwrite: bool = False,
    repair: bool = False,
) -> list[CaptureResult]:
    """Capture the missing shards of each split, or one part of them, in this process.

    Raises:
        DecantError: another process captures the same part, or everything, or shares the work
            among a different number of parts.
    """
    with lock_cache(params, part=part, parts=parts):
        return _capture(params, part, parts, overwrite=overwrite, repair=repair)


def _capture(
    params: Params, part: int, parts: int, *, overwrite: bool, repair: bool
) -> list[CaptureResult]:
    captures = open_captures(params, overwrite=overwrite, repair=repair)
    for capture in captures:
        say_repaired(capture.corpus.split, capture.repaired)
    todo = [part_of(capture.writer.missing(), part, parts) for capture in captures]
    _announce(captures, todo)
    return [capture.run(shards) for capture, shards in zip(captures, todo, strict=True)]


def _announce(captures: list[Capture], todo: list[list[int]]) -> None:
    shards = sum(map(len, todo))
    if not shards:
        announce("prepare", "every shard is captured already")
        return
    tokens = sum(
        capture.tokens_of(numbers) for capture, numbers in zip(captures, todo, strict=True)
    )
    teacher, made_from = captures[0].teacher, captures[0].fingerprint
    announce(
        "prepare",
        f"captures {made_from.kept} of {tokens:,} tokens in {shards} shards from "
        f"{teacher.describe()}",
        tokens * captures[0].seconds_per_token(),
    )


def part_of(shards: list[int], part: int, parts: int) -> list[int]:
    """Return every parts-th shard: those that process `part` (from 1) of `parts` captures."""
    return [shard for shard in shards if shard % parts == part - 1]
