import errno
import json
import os

import pytest

from pipeline.io.files import create_bytes, write_json, write_text


def test_a_write_that_fails_leaves_the_older_file_and_nothing_beside_it(tmp_path):
    file = tmp_path / "metrics.json"
    write_json(file, {"loss": 1.0})
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "a" * 100_000 + "\udc80")
    assert json.loads(file.read_text()) == {"loss": 1.0}
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]


def test_a_file_linked_into_dvcs_cache_is_replaced_not_written_through(tmp_path):
    cached = tmp_path / "cached"
    cached.write_text("old")
    linked = tmp_path / "metrics.json"
    os.link(cached, linked)
    write_text(linked, "new")
    assert (cached.read_text(), linked.read_text()) == ("old", "new")


@pytest.mark.parametrize("links", [True, False])
def test_of_two_creators_the_first_wins_with_and_without_hard_links(links, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    file = tmp_path / "new" / "zarr.json"
    assert create_bytes(file, b"first")
    assert not create_bytes(file, b"second")
    assert file.read_bytes() == b"first"
    assert [entry.name for entry in file.parent.iterdir()] == ["zarr.json"]
