"""vLLM as the teacher's engine: a stand-in for it in an environment of its own, and vLLM itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from pipeline.capture.capture import fingerprint_of, open_capture
from pipeline.capture.local import capture_locally
from pipeline.config.cache_params import VllmParams
from pipeline.config.params import Params, load_params
from pipeline.data.corpus_zarr import SPLITS, CorpusSplit
from pipeline.errors import DecantError, ParamsError
from pipeline.evaluation.compare import compare
from pipeline.evaluation.models import open_models
from pipeline.teacher import engines, vllm_process
from pipeline.teacher.engines import open_teacher
from pipeline.teacher.transformers import HuggingFaceTeacher
from pipeline.teacher.vllm import VllmTeacher, describe_vllm
from pipeline.training.run import run_training
from stages import verify
from tests.helpers import ROOT, change, judge, open_cache
from tests.models import edit_json, make_teacher
from tests.waiting import wait_until

CPU, FLOAT32 = torch.device("cpu"), torch.float32


@pytest.fixture(autouse=True)
def log_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where logs of vLLM are, those that are kept."""
    folder = tmp_path / "logs"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def open_vllm(python: Path, folder: Path, dtype: torch.dtype = FLOAT32, **options: Any) -> Any:
    return VllmTeacher(
        folder,
        VllmParams(python=python, options=options),
        row_length=32,
        batch_tokens=128,
        vocab_size=300,
        dtype=dtype,
        device=CPU,
    )


@pytest.fixture(scope="module")
def teacher(vllm_python: Path, teacher_folder: Path) -> Iterator[VllmTeacher]:
    teacher = open_vllm(vllm_python, teacher_folder)
    yield teacher
    teacher.close()


def in_vllm(params: Params, python: Path, **options: Any) -> Params:
    return change(
        params, prepare={"engine": "vllm", "vllm": {"python": str(python), "options": options}}
    )


def require_equal_to_transformers(teacher: VllmTeacher, folder: Path) -> None:
    """With documents and padding, which belongs to the document before it, and without."""
    wanted = HuggingFaceTeacher(folder, vocab_size=300, dtype=FLOAT32, device=CPU)
    tokens = torch.randint(300, (3, 32))
    doc_ids = torch.zeros(3, 32, dtype=torch.int64)
    doc_ids[0, 10:], doc_ids[0, 11:], doc_ids[1, 20:], doc_ids[2, 16:] = 1, 2, -1, 3
    for apart in (None, doc_ids):
        states = teacher.hidden_states(tokens, apart)
        torch.testing.assert_close(states, wanted.hidden_states(tokens, apart), rtol=0, atol=1e-4)
        found = teacher.top_k(tokens, 16, (1.0, 2.0), doc_ids=apart)
        expected = wanted.top_k(tokens, 16, (1.0, 2.0), doc_ids=apart)
        assert torch.equal(found.ids[..., :2], expected.ids[..., :2])
        torch.testing.assert_close(found.lse_tau, expected.lse_tau, rtol=1e-4, atol=1e-4)
    assert teacher.num_parameters == wanted.num_parameters


def test_it_equals_transformers(teacher: VllmTeacher, teacher_folder: Path) -> None:
    require_equal_to_transformers(teacher, teacher_folder)
    said = "a llama of 0.2 M parameters in float32 on cpu by vLLM 1.2.3"
    assert teacher.describe() == said


def run_verify(params: Params, file: Path) -> Any:
    file.write_text(yaml.safe_dump(params.model_dump(mode="json")))
    return CliRunner().invoke(verify.main, ["--params", str(file)], catch_exceptions=False)


def test_a_cache_through_vllm_passes_the_gate_of_transformers(
    tiny_corpus: Params, vllm_python: Path, tmp_path: Path, log_folder: Path
) -> None:
    params = in_vllm(tiny_corpus, vllm_python, gpu_memory_utilization=0.5)
    capture_locally(params)
    assert open_cache(params).fingerprint.engine == "vllm 1.2.3"
    assert not list(log_folder.iterdir())  # without a fault a log is deleted
    done = run_verify(params, tmp_path / "params.yaml")
    assert done.exit_code == 0, done.output
    assert "cache by vllm 1.2.3, noise floor by vllm 1.2.3, judged by transformers\n" in done.output
    metrics = json.loads((params.paths.verify / "metrics.json").read_text())
    assert (metrics["capture_engine"], metrics["live_engine"]) == ("vllm 1.2.3", "transformers")
    assert metrics["noise_floor"]["mean_kl"] > 0.0  # two engines round differently
    done = run_verify(change(params, prepare={"engine": "transformers"}), tmp_path / "params.yaml")
    assert done.exit_code == 1
    assert "was made with engine=vllm 1.2.3, wanted is transformers" in done.output


def objects(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_capture_whose_engine_dies_continues_to_the_same_bytes(
    teacher: VllmTeacher,
    tiny_corpus: Params,
    vllm_python: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_VLLM", f"die:{tmp_path / 'died'}")
    params = in_vllm(tiny_corpus, vllm_python)
    with pytest.raises(
        DecantError,
        match=r"^vLLM ended with status -9 \(INFO these are the last words\); its log is \S+\.log: "
        r"if memory ran out, .*, then run the same command to continue$",
    ):
        capture_locally(params)
    [first, *_] = results = capture_locally(params)
    assert 0 < first.shards_done < first.shards
    assert all(not result.shards_missing for result in results)
    whole = change(params, paths={"logits": str(tmp_path / "whole")})
    for split in SPLITS:
        corpus = CorpusSplit(params.paths.corpus, split)
        capture = open_capture(teacher, corpus, fingerprint_of(whole, corpus, FLOAT32), whole)
        capture.run(capture.writer.missing())
        assert objects(params.paths.logits / split) == objects(tmp_path / "whole" / split)


@pytest.mark.parametrize(
    ("fault", "options", "sentence"),
    [
        ("skip", {}, r"vLLM returned states of 15 positions in 3,840 bytes for 16 tokens of 64 "),
        ("normalise", {}, r"vLLM 1\.2\.3 scales the states of \S+ to length 1, so its logits are"),
        ("random", {}, r"the states that vLLM 1\.2\.3 computes for \S+ differ from transformers' "),
        (
            "",
            {"unknown": 1},
            r"vLLM failed \(TypeError: LLM.__init__\(\) got an unexpected .*; it",
        ),
        ("kill at start", {}, r"vLLM ended while it started with status -6 \(.*\); its log is "),
        ("hang", {}, r"vLLM has not answered for 4 s; its log is \S+\.log: look there for the "),
    ],
)
def test_faults_are_one_sentence(
    fault: str,
    options: dict[str, Any],
    sentence: str,
    vllm_python: Path,
    teacher_folder: Path,
    log_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_VLLM", fault)
    monkeypatch.setattr(vllm_process, "_END_SECONDS", 0.2)
    if fault == "hang":
        monkeypatch.setattr(vllm_process, "_START_SECONDS", 4.0)
    with pytest.raises(DecantError, match=f"^{sentence}"):
        open_vllm(vllm_python, teacher_folder, **options)


def test_weights_that_vllm_dequantised_are_refused(
    vllm_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_teacher(tmp_path / "model")
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8"})
    monkeypatch.setenv("FAKE_VLLM", "random")
    with pytest.raises(DecantError, match=r"^vLLM 1\.2\.3 dequantised \S+ \(fp8\) when it loaded"):
        open_vllm(vllm_python, folder)


def test_an_interpreter_without_vllm_is_one_sentence(tmp_path: Path, teacher_folder: Path) -> None:
    with pytest.raises(DecantError, match=r"^prepare\.engine=vllm needs vLLM, which \S+ does not "):
        open_vllm(Path(sys.executable), teacher_folder)
    with pytest.raises(DecantError, match=r"^prepare\.vllm\.python=\S+ cannot be run \(.*No such"):
        open_vllm(tmp_path / "python", teacher_folder)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_vllm_ends_with_the_process_that_started_it(
    how: signal.Signals, vllm_python: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    script = textwrap.dedent(
        f"""
        import sys, time
        from pathlib import Path
        from pipeline.teacher.vllm_process import VllmProcess
        arguments = dict(runner="pooling", enable_prefix_caching=False, model="{teacher_folder}")
        arguments |= dict(pooler_config=dict(use_activation=False), dtype="float32")
        engine = VllmProcess(
            Path("{vllm_python}"), arguments | dict(max_model_len=8), threads=1
        )
        print(engine._process.pid, flush=True)
        time.sleep(600)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | {"FAKE_VLLM": "random", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    pid = next(int(line) for line in process.stdout if line.strip().isdigit())
    assert not gone(pid)
    process.send_signal(how)
    process.wait()
    wait_until(lambda: gone(pid))


def test_torchrun_is_refused(
    tiny_corpus: Params, vllm_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = SimpleNamespace(ranks=SimpleNamespace(world_size=2))
    monkeypatch.setattr(engines, "led_ranks", lambda: group)
    with pytest.raises(ParamsError, match=r"^prepare\.engine=vllm starts processes of its own"):
        open_teacher(in_vllm(tiny_corpus, vllm_python), 300, FLOAT32, CPU)


def test_dequantising_is_refused(tiny_corpus: Params, vllm_python: Path) -> None:
    params = change(in_vllm(tiny_corpus, vllm_python), prepare={"dequantize": True})
    with pytest.raises(ParamsError, match=r"^prepare\.dequantize=true, and vLLM never dequantises"):
        open_teacher(params, 300, FLOAT32, CPU)


def test_an_online_teacher_is_refused(tiny_corpus: Params, vllm_python: Path) -> None:
    params = change(in_vllm(tiny_corpus, vllm_python), train={"targets": "online"})
    with pytest.raises(ParamsError, match=r"^train\.targets=online runs the teacher beside the "):
        run_training(params, "student")


def test_evaluate_takes_vllm(teacher: VllmTeacher, tiny_corpus: Params) -> None:
    corpus = CorpusSplit(tiny_corpus.paths.corpus, "validation")
    folder = tiny_corpus.paths.teacher
    models = open_models({"copy": folder}, corpus, folder, dtypes={"copy": FLOAT32}, device=CPU)
    found = compare(teacher, models, corpus, tiny_corpus.evaluate, document_mask=True).scores
    wanted = judge(tiny_corpus, {"copy": folder}).scores
    assert found["teacher"].loss == pytest.approx(wanted["teacher"].loss, abs=1e-4)
    kl = [scores["copy"].kl_to_teacher for scores in (found, wanted)]
    assert kl[0] == pytest.approx(kl[1], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "vllm 1.2.3"),
        ({"gpu_memory_utilization": 0.5, "tensor_parallel_size": 1}, "vllm 1.2.3"),
        (
            {"tensor_parallel_size": 2, "quantization": "fp8", "pipeline_parallel_size": 2},
            "vllm 1.2.3, quantization=fp8, tensor_parallel_size=2",
        ),
        ({"attention_config": {"b": 1, "a": 2}}, 'vllm 1.2.3, attention_config={"a": 2, "b": 1}'),
    ],
)
def test_the_fingerprint_names_what_changes_numbers(
    options: dict[str, Any], said: str, vllm_python: Path
) -> None:
    assert describe_vllm(VllmParams(python=vllm_python, options=options), None) == said


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("dtype=half", "dtype of vLLM is set by Decant: set prepare.dtype instead"),
        ("runner=generate", "runner of vLLM is set by Decant: leave it out"),
        ("tensor_parallel_size=0", "tensor_parallel_size=0 is not a number of devices: set it to "),
    ],
)
def test_options_that_decant_sets_are_refused(option: str, sentence: str) -> None:
    with pytest.raises(ParamsError) as error:
        load_params(ROOT / "params.yaml", [f"prepare.vllm.options.{option}"])
    said = f"{ROOT / 'params.yaml'}: prepare.vllm.options is refused: {sentence}"
    assert str(error.value).startswith(said)


def make_large(folder: Path) -> Path:
    """A model whose heads have a size that vLLM's kernels for CPUs take, and which divide by 2."""
    return make_teacher(folder, num_attention_heads=2, num_key_value_heads=2)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"tensor_parallel_size": 2}])
def test_vllm_itself(options: dict[str, Any], tmp_path: Path) -> None:
    folder = make_large(tmp_path / "model")
    live = open_vllm(Path(os.environ["DECANT_TEST_VLLM"]), folder, **options)
    try:
        require_equal_to_transformers(live, folder)
        tokens = torch.randint(300, (4, 32))
        assert torch.equal(live.hidden_states(tokens), live.hidden_states(tokens))
    finally:
        live.close()


@pytest.mark.vllm
@pytest.mark.slow
def test_a_cache_of_vllm_itself_passes_the_gate(tiny_corpus: Params, tmp_path: Path) -> None:
    params = in_vllm(tiny_corpus, Path(os.environ["DECANT_TEST_VLLM"]))
    params = change(params, paths={"teacher": str(make_large(tmp_path / "model"))})
    capture_locally(params)
    for engine in ("transformers", "vllm"):
        done = run_verify(change(params, verify={"engine": engine}), tmp_path / "params.yaml")
        assert done.exit_code == 0, done.output
        assert ("judged by transformers" in done.output) == (engine == "transformers")
