"""The stage as a user runs it, and publishing, against a stand-in for the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from gguf import GGUFReader

from pipeline.config.params import Params, load_params
from pipeline.errors import DecantError, MismatchError, ParamsError
from pipeline.export import check
from pipeline.export.check import WITHOUT_LLAMA_CPP
from pipeline.export.check_result import TokenizerResult
from pipeline.export.export import export_model
from pipeline.export.llama_cpp import has_llama_cpp
from pipeline.export.push import files_of, require_repo_id
from pipeline.export.source import Exported, find_model, text_to_check_by
from pipeline.io.ownership import MARK
from pipeline.model.weights import load_student, save_student
from pipeline.training.run import run_training
from stages import export as stage
from tests.export.hub import Hub
from tests.helpers import ROOT, SMALL, change, judge
from tests.models import text_of_many_lines


def run_python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def tiny_run(tiny_corpus: Params, tmp_path: Path) -> Params:
    """A corpus, and a student as a run leaves it."""
    params = change(tiny_corpus, export={"gguf": ["f16", "q8_0"]})
    teacher = params.paths.teacher
    student = load_student(teacher, [0, 2])
    save_student(student, params.paths.runs / "student" / "model", tokenizer_from=teacher)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    return params


def test_by_hand_with_a_dry_run(tiny_run: Params, tmp_path: Path) -> None:
    words = ["stages/export.py", "--params", str(tmp_path / "params.yaml")]
    with Hub() as hub:
        dry = ["--push", "some-org/tiny", "--dry-run"]
        done = run_python(*words, *dry, HF_ENDPOINT=hub.address)
    assert done.returncode == 0, done.stderr
    assert not hub.requests
    folder = tiny_run.paths.export / "student"
    names = [name for name, _ in files_of(folder)]
    assert names == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "student-f16.gguf",
        "student-q8_0.gguf",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in names:
        assert f"MB  {name}" in done.stdout
    assert "these would go to some-org/tiny, private; nothing was sent" in done.stdout
    assert "16 of 16 tokens as ours, float32, 4 of 4 prompts" in done.stdout
    assert f"export: {folder} holds 8 files" in done.stdout
    # No run.json says that it has a teacher.
    said = "the model card leaves out what is recorded nowhere: set export.license\n"
    assert said in done.stdout
    check = json.loads((tiny_run.paths.export / "check.json").read_text())
    assert (check["model"], check["passed"], check["prompts"]) == ("student", True, 4)
    assert len(check["paths"]) == (3 if has_llama_cpp() else 1)
    assert (WITHOUT_LLAMA_CPP in done.stdout) is not has_llama_cpp()


def test_a_random_student_of_auto_rows_goes_the_whole_way(
    tiny_corpus: Params, tmp_path: Path
) -> None:
    """300 ids, 320 rows: trained, exported with GGUF, checked on all paths, and evaluated."""
    student = {"init": "random"} | SMALL | {"vocab_size": "auto", "attention_bias": False}
    train = {"steps": 2, "targets": "none"}
    params = change(tiny_corpus, student=student, train=train, export={"gguf": ["f16", "q8_0"]})
    model = run_training(params, "student").folder / "model"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    done = CliRunner().invoke(
        stage.main, ["--params", str(tmp_path / "params.yaml")], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    exported = params.paths.export / "student"
    for folder in (model, exported):
        assert json.loads((folder / "config.json").read_text())["vocab_size"] == 320
    tokens = GGUFReader(exported / "student-f16.gguf").fields["tokenizer.ggml.tokens"]
    assert len(tokens.data) == 320
    scores = judge(params, {"ours": model, "exported": exported}).scores
    assert scores["ours"].loss == pytest.approx(scores["exported"].loss, abs=0.05)


def test_a_path_that_differs_is_status_1_and_nothing_is_pushed(
    tiny_run: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[str] = []
    monkeypatch.setattr(
        "pipeline.export.push.push", lambda folder, name, public: pushed.append(name) or "there"
    )
    words = ["--params", str(tmp_path / "params.yaml"), "--set", "export.gguf=[]", "--push", "o/n"]
    done = CliRunner().invoke(stage.main, words)
    assert done.exit_code == 0
    assert "pushed to there" in done.output
    assert pushed == ["o/n"]
    differs = TokenizerResult("transformers", 9, 8, False)
    monkeypatch.setattr(check, "compare_lines", lambda *_: differs)
    done = CliRunner().invoke(stage.main, words)
    assert done.exit_code == 1
    assert "FAIL  transformers tokenizer" in done.output
    assert "does NOT agree" in done.output
    assert pushed == ["o/n"]


PUSH = (
    "import sys; from pathlib import Path; from pipeline.export.push import push\n"
    "print(push(Path(sys.argv[1]), sys.argv[2], public=sys.argv[3] == 'public'))"
)


@pytest.mark.parametrize("visibility", ["private", "public"])
def test_every_byte_arrives(visibility: str, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / MARK).write_text("{}")  # concerns this machine alone
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(300_000))
    (folder / "x-q8_0.gguf").write_bytes(os.urandom(70_001))
    with Hub() as hub:
        done = run_python(
            *("-c", PUSH, str(folder), "some-org/tiny", visibility),
            HF_ENDPOINT=hub.address,
            HF_TOKEN="hf_of_the_test",
            HF_HUB_DISABLE_XET="1",  # the stand-in has the older protocol for large files
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.address}/some-org/tiny"
    (folder / MARK).unlink()
    assert hub.files == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert hub.repositories["some-org/tiny"]["visibility"] == visibility
    assert hub.tokens == {"Bearer hf_of_the_test"}
    assert sum("/blob/" in request for request in hub.requests) == 2


def test_a_hub_out_of_reach_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    code = (
        "from pathlib import Path; from pipeline.errors import DecantError\n"
        "from pipeline.export.push import push\n"
        f"try: push(Path({str(tmp_path)!r}), 'o/n', public=False)\n"
        "except DecantError as error: print(error)"
    )
    done = run_python("-c", code, HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN="hf_x")
    assert len(done.stdout.strip().splitlines()) == 1, done.stderr
    assert "could not be pushed to o/n" in done.stdout
    assert "hf auth login" in done.stdout


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "a b/c", "-a/b", ""])
def test_names_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(ParamsError, match="is no name on the hub: give ORG/NAME"):
        require_repo_id(name)
    require_repo_id("some-org/tiny_model.v1")


def test_flags_that_need_push(tiny_run: Params, tmp_path: Path) -> None:
    done = CliRunner().invoke(stage.main, ["--params", str(tmp_path / "params.yaml"), "--public"])
    assert done.exit_code == 2
    assert done.output.startswith("error: --public and --dry-run go with --push")


def test_an_export_that_fails_leaves_the_older_one(
    tiny_run: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = find_model(tiny_run, "student", None)
    folder = export_model(tiny_run, model)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full_disk(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.export.export.write_gguf", full_disk)
    with pytest.raises(
        DecantError, match=r"student could not be written: .* the disk is full .* free"
    ):
        export_model(tiny_run, model)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [entry.name for entry in tiny_run.paths.export.iterdir()] == ["student"]


def test_a_check_tells_of_the_folder_beside_it(
    tiny_run: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was stopped leaves no older check, which told of another model."""
    words = ["--params", str(tmp_path / "params.yaml"), "--set", "export.gguf=[]"]
    assert CliRunner().invoke(stage.main, words).exit_code == 0
    check_file = tiny_run.paths.export / "check.json"
    assert check_file.exists()

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.export.export.check_model", stopped)
    assert CliRunner().invoke(stage.main, words).exit_code == 130
    assert (tiny_run.paths.export / "student").is_dir()
    assert not check_file.exists()


@pytest.mark.parametrize("run", ["../runs/student", "a/b", "..", "", "."])
def test_a_run_is_a_word(run: str, tiny_run: Params) -> None:
    """A path could name a folder that the export would be written over."""
    with pytest.raises(ParamsError, match="is not the name of one folder in"):
        find_model(tiny_run, run, None)


def test_an_export_is_not_made_of_itself(tiny_run: Params) -> None:
    folder = export_model(tiny_run, find_model(tiny_run, "student", None))
    with pytest.raises(ParamsError, match="would be replaced by itself"):
        find_model(tiny_run, "student", folder)


def test_exporting_twice_gives_the_same_bytes(tiny_run: Params) -> None:
    model = find_model(tiny_run, "student", None)
    folder = export_model(tiny_run, model)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert export_model(tiny_run, model) == folder
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_what_is_exported(tiny_run: Params, tmp_path: Path) -> None:
    model = tiny_run.paths.runs / "student" / "model"
    assert find_model(tiny_run, "student", None) == Exported("student", model, "student")
    assert find_model(tiny_run, "student", model) == Exported("student", model, None)
    teacher = tiny_run.paths.teacher
    assert find_model(tiny_run, "student", teacher).name == teacher.resolve().parent.name
    with pytest.raises(DecantError, match=r"run stages/train\.py --run other first"):
        find_model(tiny_run, "other", None)
    with pytest.raises(DecantError, match="name a model folder"):
        find_model(tiny_run, "student", tmp_path / "nothing")


def test_text_to_check_by(tiny_run: Params, tmp_path: Path, qwen_folder: Path) -> None:
    text = text_to_check_by(tiny_run, tiny_run.paths.runs / "student" / "model")
    assert "the teacher" in text
    assert "<|endoftext|>" not in text
    assert text_to_check_by(tiny_run, qwen_folder) == text  # by the teacher's tokenizer
    elsewhere = change(tiny_run, paths={"teacher": str(tmp_path)})
    with pytest.raises(MismatchError, match=r"name a text to check by in export\.text"):
        text_to_check_by(elsewhere, qwen_folder)
    (tmp_path / "text.txt").write_text(text_of_many_lines(), encoding="utf-8")
    named = change(elsewhere, export={"text": str(tmp_path / "text.txt")})
    assert text_to_check_by(named, qwen_folder) == text_of_many_lines()
    with pytest.raises(ParamsError, match="cannot be read as UTF-8 text"):
        text_to_check_by(change(tiny_run, export={"text": str(tmp_path / "no")}), qwen_folder)


def test_parameters_are_checked() -> None:
    for text in ("export.gguf=[q4_0]", "export.dtype=int8", "export.min_agreement=2"):
        with pytest.raises(ParamsError, match=text.split("=")[0].replace(".", r"\.")):
            load_params(ROOT / "params.yaml", [text])
