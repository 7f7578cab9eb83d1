from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.data import seen_documents
from pipeline.data.seen_documents import SeenDocuments
from pipeline.errors import DecantError


def digest_of(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


@pytest.mark.parametrize("in_memory", [0, 1, 100, 10_000])
def test_it_is_a_set_wherever_the_digests_lie(in_memory: int) -> None:
    numbers = [random.Random(5).randrange(600) for _ in range(2000)]
    known: set[int] = set()
    with SeenDocuments(in_memory) as seen:
        for number in numbers:
            assert (digest_of(number) in seen) == (number in known)
            assert seen.add(digest_of(number)) == (number not in known)
            known.add(number)


def test_nothing_is_left_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even while it is open, so a killed process leaves nothing either."""
    monkeypatch.setattr(seen_documents, "_CACHE_KIB", 16)
    before = set(open_files())
    with SeenDocuments(0) as seen:
        for number in range(20_000):
            seen.add(digest_of(number))
        (file,) = set(open_files()) - before
        assert file.endswith(" (deleted)")
    assert set(open_files()) == before


def open_files() -> Iterator[str]:
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one of this listing
            yield str(descriptor.readlink())


def test_a_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    create = seen_documents._temporary_database

    def small() -> object:
        database = create()
        database.execute("PRAGMA max_page_count = 10")
        return database

    monkeypatch.setattr(seen_documents, "_temporary_database", small)
    with SeenDocuments(0) as seen:
        add = seen.add
        with pytest.raises(DecantError, match=r"disk is full.* SQLITE_TMPDIR") as caught:
            all(add(digest_of(number)) for number in range(20_000))
    assert "\n" not in str(caught.value)
