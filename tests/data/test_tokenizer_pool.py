"""Tokenizing in several processes: the same bytes, and no hang whatever ends it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import yaml

from pipeline.config.params import Params
from pipeline.data import tokenizer_pool
from pipeline.data.corpus import build_corpus
from pipeline.data.document_tokenizer import DocumentTokenizer, Tokenized, TokenizerSettings
from pipeline.data.prefix import PrefixEncoder
from pipeline.data.tokenizer_pool import LocalPool, available_cores, ray_pool
from pipeline.errors import DecantError
from pipeline.model.folder import hash_tokenizer
from pipeline.model.tokenizer import load_tokenizer
from pipeline.runtime.optional import import_ray
from tests.helpers import ROOT, change
from tests.models import make_sentences, make_teacher
from tests.waiting import wait_until

is_ready = LocalPool._is_ready


def wait_until_ready(pool: LocalPool) -> bool:
    """Let no document be tokenized before the processes are there."""
    is_ready(pool)  # which starts them
    for worker in pool._workers:
        if not worker.is_ready():
            worker.connection.poll(None)
    return is_ready(pool)


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def many(tiny_params: Params, tmp_path: Path) -> Params:
    """Texts and chats, with duplicates, bad rows and bad conversations among them."""
    teacher = make_teacher(tmp_path / "with_template")
    (teacher / "chat_template.jinja").write_text(TEMPLATE)
    rows: list[Any] = []
    for number, text in enumerate(make_sentences(300, seed=3)):
        answer = {"role": "assistant", "content": text[:50]}
        rows.append(text if number % 3 else [{"role": "user", "content": f"{number}?"}, answer])
    rows[40] = rows[200] = rows[41]  # text
    rows[60] = rows[210] = rows[63]  # chat
    rows[100] = 7
    rows[120] = [{"role": "nobody", "content": "?"}]
    rows[150] = "half \ud83d of one"
    rows[180] = " ".join(make_sentences(2000, seed=4))
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps({"it": row}) + "\n" for row in rows))
    files = {"paths": [str(file)], "column": "it"}
    changes = {"files": files, "train_tokens": None, "validation_tokens": 900}
    return change(tiny_params, paths={"teacher": str(teacher)}, corpus=changes)


def contents(params: Params, where: Path, **options: Any) -> dict[str, bytes]:
    """The files of a corpus that is built at `where`."""
    build_corpus(params.corpus, params.paths.teacher, where, **options)
    files = (file for file in where.rglob("*") if file.is_file())
    return {str(file.relative_to(where)): file.read_bytes() for file in files}


def test_the_corpus_does_not_depend_on_the_workers(
    many: Params,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tokenizer_pool, "START_SECONDS", 0.0)
    monkeypatch.setattr(LocalPool, "_is_ready", wait_until_ready)
    expected = contents(many, tmp_path / "1", workers=1)
    said = capsys.readouterr().out
    for row, reason in ((101, "'7'"), (121, "'nobody' is none of"), (151, "surrogate")):
        assert re.search(rf"many\.jsonl, row {row}: .*{reason}", said)
    assert re.search(r"[1-9] exact duplicates are left out of train", said)
    for workers in (2, 3):
        assert contents(many, tmp_path / str(workers), workers=workers) == expected
        assert capsys.readouterr().out == said
    limited = change(many, corpus={"train_tokens": 500, "validation_tokens": 100})
    expected = contents(limited, tmp_path / "limited 1", workers=1)
    said = capsys.readouterr().out
    assert contents(limited, tmp_path / "limited 2", workers=2) == expected
    assert capsys.readouterr().out == said


def settings_of(params: Params, **changes: Any) -> TokenizerSettings:
    return TokenizerSettings(
        **{
            "teacher": params.paths.teacher,
            "sha256": hash_tokenizer(params.paths.teacher),
            "version": tokenizers.__version__,
            "completions_only": False,
            "add_bos": "auto",
            "longest": None,
            "max_document_tokens": None,
        }
        | changes
    )


def test_processes_start_late_and_report_errors(
    tiny_params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tiny_params, completions_only=True)
    here = DocumentTokenizer(load_tokenizer(tiny_params.paths.teacher), settings)
    with LocalPool(here, settings, 2) as pool:
        for _ in range(3):
            assert pool.depth == 1
            pool.submit(["a text"])()
        assert not pool._workers
        monkeypatch.setattr(tokenizer_pool, "START_SECONDS", 0.0)
        monkeypatch.setattr(LocalPool, "_is_ready", wait_until_ready)
        (error,) = pool.submit(["a text"])()
        assert "corpus.loss_on=completions needs conversations" in str(error)
        processes = [worker.process for worker in pool._workers]
        assert len(processes) == 2
        processes[0].kill()
        with pytest.raises(DecantError, match=r"was killed, .* set --workers below 2") as caught:
            all(pool.submit(["a text"])() for _ in range(1000))
        assert "\n" not in str(caught.value)
    assert not any(process.is_alive() for process in processes)


@pytest.fixture
def two_processes(tiny_params: Params, monkeypatch: pytest.MonkeyPatch) -> LocalPool:
    """A pool whose processes tokenize from the first block on, not entered yet."""
    monkeypatch.setattr(tokenizer_pool, "START_SECONDS", 0.0)
    monkeypatch.setattr(LocalPool, "_is_ready", wait_until_ready)
    settings = settings_of(tiny_params)
    here = DocumentTokenizer(load_tokenizer(tiny_params.paths.teacher), settings)
    return LocalPool(here, settings, 2)


@pytest.mark.parametrize("killed", [True, False])
def test_a_process_may_end_while_it_sends_its_result(
    killed: bool, two_processes: LocalPool
) -> None:
    text = "a word " * 300_000  # whose tokens no pipe holds
    with two_processes as pool:
        pending = pool.submit([text])
        worker = pool._workers[0]
        status = Path(f"/proc/{worker.process.pid}/status").read_text()
        blocked = int(re.findall(r"SigBlk:\s*(\w+)", status)[0], 16)
        assert blocked >> (signal.SIGINT - 1) & 1  # Ctrl-C is for the process that started it
        worker._wait(0)
        wait_until(worker.connection.poll)  # the first of them have arrived
        if killed:
            worker.process.kill()
            with pytest.raises(DecantError, match="was killed"):
                pending()
    assert not worker.process.is_alive()


def test_any_error_reaches_the_other_process() -> None:
    class Panic(BaseException):
        """As pyo3's, which is no Exception; nor can pickle find this class."""

    known = tokenizer_pool._portable(DecantError("one sentence"))
    assert type(known) is DecantError
    assert str(tokenizer_pool._portable(Panic("overflow"))) == "Panic: overflow"


def test_blocks_may_be_waited_for_in_any_order(two_processes: LocalPool) -> None:
    """As by several sources, whose documents are asked for by turns."""
    here = two_processes._here
    with two_processes as pool:
        pending = [pool.submit([f"the text {number}"]) for number in range(7)]
        for number in (6, 0, 5, 2, 1, 4, 3):
            [result], [expected] = pending[number](), here([f"the text {number}"])
            assert isinstance(result, Tokenized)
            assert isinstance(expected, Tokenized)
            assert result.tokens.tolist() == expected.tokens.tolist()


@pytest.mark.parametrize("name", ["sha256", "version"])
def test_another_tokenizer_elsewhere_is_one_sentence(name: str, tiny_params: Params) -> None:
    with pytest.raises(DecantError, match="a machine of the Ray cluster has "):
        tokenizer_pool.tokenize_block(settings_of(tiny_params, **{name: "other"}), [])


def test_a_document_on_which_the_tokenizer_fails_is_left_out(
    tiny_params: Params,
    text_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encode = PrefixEncoder.texts

    def fails(self: PrefixEncoder, texts: list[str]) -> Any:
        if any(text.startswith("Note 7:") for text in texts):
            raise RuntimeError("out of\nrange")
        return encode(self, texts)

    monkeypatch.setattr(PrefixEncoder, "texts", fails)
    params = change(tiny_params, corpus={"train_tokens": None, "validation_tokens": 10**6})
    infos = build_corpus(params.corpus, params.paths.teacher, params.paths.corpus)
    assert sum(info.num_documents for info in infos.values()) == 119
    lines = (text_folder / "documents.jsonl").read_text().splitlines()
    row = next(n for n, line in enumerate(lines, 1) if "Note 7:" in line)
    said = capsys.readouterr().out
    assert f"documents.jsonl, row {row}: the tokenizer fails on it (out of range)" in said


@pytest.fixture
def at_work(tiny_params: Params, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The stage in a process group of its own, with two processes that tokenize a large text."""
    text = " ".join(make_sentences(20, seed=1))
    with (tmp_path / "large.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"{n} {text}"}) + "\n" for n in range(2000))
    values = tiny_params.model_dump(mode="json")
    values["corpus"]["files"] = {"paths": [str(tmp_path / "large.jsonl")], "column": "text"}
    values["corpus"]["train_tokens"] = None
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    code = (
        "from pipeline.data import tokenizer_pool; tokenizer_pool.START_SECONDS = 0.1; "
        "from stages.corpus import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--params", str(tmp_path / "params.yaml"), "--workers", "2"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes that have been started to tokenize; the resource tracker is no such one."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [
        int(child)
        for child in children
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_ends_all_processes(
    number: signal.Signals, at_work: subprocess.Popen[str], tiny_params: Params
) -> None:
    wait_until(lambda: len(workers_of(at_work)) == 2)
    workers = workers_of(at_work)
    if number == signal.SIGINT:
        os.killpg(at_work.pid, number)  # as a terminal does
        _, said = at_work.communicate()
        assert at_work.returncode == 130
        assert said.splitlines()[-1] == "error: interrupted: run the same command to continue"
        assert "Traceback" not in said
    else:
        at_work.kill()
    wait_until(lambda: not any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers))
    assert not list(Path(str(tiny_params.paths.corpus)).glob("*/zarr.json"))


def test_an_interrupt_waits_until_the_processes_have_started() -> None:
    """A signal to the process reaches its other threads, even if the main thread blocks it."""
    ended, passed = threading.Event(), []
    other = threading.Thread(target=ended.wait)
    other.start()

    def interrupted() -> None:
        with tokenizer_pool._interrupts_deferred():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)  # the handler runs here
            passed.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        ended.set()
    assert len(passed) == 1
    assert signal.SIGINT in passed[0]  # started processes inherit this
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_cores_are_those_that_may_be_used() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


def test_on_ray(many: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes; a worker that is killed is replaced."""
    pytest.importorskip("ray")
    import_ray()
    from ray.cluster_utils import Cluster

    expected = contents(many, tmp_path / "local", workers=1)
    head = {"num_cpus": 2, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        assert contents(many, tmp_path / "ray", workers=None, on_ray=True) == expected
        with (
            pytest.raises(DecantError, match="a machine of the Ray cluster has tokenizers"),
            ray_pool(settings_of(many, version="0"), 1) as pool,
        ):
            pool.submit(["a text"])()
    finally:
        cluster.shutdown()
