"""What all stages share: words that reach the user, and streams that do not."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from pipeline.cli import stage
from pipeline.config.params import Params
from pipeline.errors import DecantError, accident, place_of, printable, shortened
from pipeline.io.ownership import MARK, atomic_folder, find_damage
from stages.generate import hand_out, say_reply
from stages.train import main as train
from tests.helpers import ROOT

SCRIPT = """
import sys, click
from pipeline.cli import stage
@stage
def main(params):
    for _ in range({lines}):
        click.echo("a line of this stage")
    sys.exit(0)
main()
"""


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_leaves_is_no_traceback(lines: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", SCRIPT.format(lines=lines)]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    said = done.stderr.decode()
    assert said == "error: the output was closed: run the same command to continue\n"
    assert done.returncode == 1


def test_no_standard_output_at_all() -> None:
    words = f"'{sys.executable}' -c \"$SCRIPT\" >&-"
    variables = os.environ | {"SCRIPT": SCRIPT.format(lines=1)}
    done = subprocess.run(words, shell=True, cwd=ROOT, env=variables, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def run_stage(error: Exception) -> str:
    """What a stage prints that ends with an error."""

    @stage
    def main(params: Params) -> None:
        raise error

    result = CliRunner().invoke(main, ["--params", str(ROOT / "params.yaml")])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    return result.stderr


def test_what_an_error_quotes_cannot_write_on_the_terminal() -> None:
    said = run_stage(DecantError("the file \x1b]0;title\x07\udc80.txt"))
    assert said == "error: the file \\x1b]0;title\\x07\\udc80.txt\n"


@given(st.text())
def test_only_what_a_terminal_obeys_is_escaped(text: str) -> None:
    shown = printable(text)
    assert not any(ord(c) < 32 and c not in "\t\n\r" for c in shown)
    assert "\r" not in shown.replace("\r\n", "")
    shown.encode()
    if text.isprintable():
        assert shown == text


def test_ordinary_text_stays() -> None:
    text = "tabs\tand\nnewlines\r\n\u4f60\u597d \U0001f469\u200d\U0001f52c \xa0 e\u0301 \u0627"
    assert printable(text) == text
    assert printable("a\x1b[2Jb\rc\x9b\u202e") == "a\\x1b[2Jb\\rc\\x9b\\u202e"


def test_generated_text_is_escaped_where_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    def pieces() -> Iterator[str]:
        yield "one\x1b"
        yield "[2J"

    assert say_reply(pieces()) == "one\x1b[2J"  # the conversation goes on with what was said
    hand_out(["prompt "], ["\x07text"], None)
    assert capsys.readouterr().out == "one\\x1b[2J\n--- 1\nprompt \\x07text\n"


def test_a_long_value_is_short_in_a_message() -> None:
    bomb: list[object] = ["x"]
    for _ in range(60):
        bomb = [bomb] * 10
    assert len(shortened(bomb)) < 200
    assert len(shortened("x" * 10_000)) < 80


def full(name: str, other: str | None = None) -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", name, None, other)


def test_a_full_disk_is_named_by_the_file_that_was_written() -> None:
    assert place_of(full("source", "target")) == "target"
    assert run_stage(full("source", "target")) == (
        "error: target: the disk is full: make room there, then run the same command\n"
    )
    of_rust = SafetensorError("I/O error: No space left on device (os error 28)")
    assert accident(of_rust) == "the disk is full"
    assert "the disk is full" in run_stage(of_rust)


CUDA_FULL = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.58 GiB of "
    "which 1.10 GiB is free. Including non-PyTorch memory, this process has 13.47 GiB in use."
)


def test_full_memory_is_one_sentence_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_stage(CUDA_FULL) == (
        "error: the GPU's memory is full (Tried to allocate 2.00 GiB. GPU 0 has a total capacity "
        "of 14.58 GiB of which 1.10 GiB is free.): close other programs, then run the "
        "same command\n"
    )
    assert run_stage(MemoryError()).startswith("error: the machine's memory is full: close other")

    def full(*_: object, **__: object) -> None:
        raise CUDA_FULL

    monkeypatch.setattr("pipeline.training.run.run_training", full)
    result = CliRunner().invoke(train, ["--params", str(ROOT / "params.yaml")])
    assert "set run.activation_checkpointing=true, lower run.head_chunk" in result.stderr


@pytest.mark.parametrize(
    "error",
    [
        full("x"),
        SafetensorError("I/O error (os error 28)"),
        OSError("1000000 requested and 249968 written"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    ],
)
def test_a_folder_that_does_not_fit_leaves_the_older_one(error: Exception, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with atomic_folder(folder, "model", key="paths.runs") as partial:
        (partial / "file").write_text("old")

    def fail() -> None:
        with atomic_folder(folder, "model", key="paths.runs") as partial:
            (partial / "file").write_bytes(bytes(2_000_000))
            raise error

    with pytest.raises(DecantError, match=r"could not be written: .* full \(the 2 MB .*free more"):
        fail()
    assert {entry.name for entry in folder.iterdir()} == {"file", MARK}
    assert (folder / "file").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert find_damage(folder) == ""


def test_damage_to_a_finished_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with atomic_folder(folder, "model", key="paths.runs") as partial:
        (partial / "weights").write_bytes(b"12")
    (folder / "weights").write_bytes(b"13")
    assert "weights, 2 bytes, does not match" in find_damage(folder)
    (folder / "weights").unlink()
    assert find_damage(folder) == "weights is missing"
    os.mkfifo(folder / "weights")
    assert find_damage(folder) == "weights is not a file"
    for text in ("", "[]", '{"files": [1]}', "[" * 100_000):
        (folder / MARK).write_text(text)
        assert find_damage(folder) == f"{MARK} cannot be read"
    (folder / MARK).unlink()
    assert find_damage(folder) == ""


def test_the_commands_name_themselves() -> None:
    assert isinstance(stage(lambda params: None), click.Command)
