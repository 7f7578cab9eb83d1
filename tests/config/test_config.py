from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.config.params import load_params
from pipeline.errors import ParamsError
from tests.helpers import ROOT

FILE = ROOT / "params.yaml"


def changed(tmp_path: Path, edit: object) -> Path:
    values = yaml.safe_load(FILE.read_text())
    edit(values)  # type: ignore[operator]
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_the_projects_own_params_are_valid() -> None:
    params = load_params(FILE)
    assert params.prepare.k == 64
    assert params.train.temperature in params.prepare.temperatures


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("train.parallel", "run.parallel"),
        ("train.head_chunk", "run.head_chunk"),
        ("train.compile", "run.compile"),
        ("prepare.batch_rows", "capture.batch_rows"),  # prepare.chunk_rows is spelled more alike
        ("prepare.head_chunk", "capture.head_chunk"),
        ("train.temprature", "train.temperature"),
    ],
)
def test_an_unknown_key_gives_its_namesake_or_neighbour(key: str, hint: str) -> None:
    with pytest.raises(ParamsError, match=rf"{key} is not a known key: did you mean {hint}\?$"):
        load_params(FILE, [f"{key}=1"])


def test_keys_and_sections_that_are_left_out_have_their_defaults(tmp_path: Path) -> None:
    file = tmp_path / "short.yaml"
    file.write_text("teacher: {source: hub, hub: {id: org/model}}\ntrain: {alpha: 0.9}\n")
    params, demo = load_params(file), load_params(FILE)
    assert (params.teacher.source, params.teacher.hub.id) == ("hub", "org/model")
    assert params.teacher.hub.revision == demo.teacher.hub.revision
    assert params.train == demo.train.model_copy(update={"alpha": 0.9})
    assert params.verify == demo.verify


@pytest.mark.parametrize(
    "edit", ["train.alpha=0.9", "student.lora.rank=8", "corpus={row_length: 8}"]
)
def test_set_means_the_same_in_a_short_file(edit: str, tmp_path: Path) -> None:
    file = tmp_path / "short.yaml"
    file.write_text("seed: 0\n")
    short = load_params(file, [edit])
    assert short == load_params(FILE, [edit])
    assert short != load_params(FILE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epochs: 3}", "steps=64 and epochs=3.0 do not say how long to train"),
        ("train: {learning_rate: 0.00005}", "min_learning_rate=0.0001 is above learning_rate"),
        ("prepare: {chunk_rows: 64}", "shard_rows=32 must be a multiple of chunk_rows=64"),
        ("train: {temprature: 2}", r"temprature is not a known key: did you mean train\.temp"),
        ("tain: {alpha: 0.5}", r"tain is not a known key: did you mean train\?"),
    ],
)
def test_a_short_file_is_checked_with_the_defaults(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "short.yaml"
    file.write_text(text)
    with pytest.raises(ParamsError, match=message):
        load_params(file)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda v: v["train"].pop("alpha"), r"train\.alpha, whose"),
        (lambda v: v.pop("verify"), r"verify, whose"),
        (lambda v: v["teacher"]["hub"].pop("id"), r"teacher\.hub\.id, whose"),
        (lambda v: (v["train"].pop("k"), v.pop("study")), r"train\.k \(and 1 more\), whose"),
        (lambda v: v["student"].update(lora={"rank": 8}), r"student\.lora\.alpha \(and 2 more\)"),
    ],
)
def test_a_complete_file_is_one_that_leaves_out_nothing(
    edit: object, named: str, tmp_path: Path
) -> None:
    load_params(FILE, complete=True)
    file = changed(tmp_path, edit)
    load_params(file)
    with pytest.raises(ParamsError, match=rf"leaves out {named}") as caught:
        load_params(file, complete=True)
    assert f"show_params --params {file} --output {file}" in str(caught.value)


def test_unknown_key_is_named_with_its_neighbour(tmp_path: Path) -> None:
    file = changed(tmp_path, lambda v: v["train"].update(temprature=2))
    message = r"train\.temprature is not a known key: did you mean train\.temperature\?"
    with pytest.raises(ParamsError, match=message):
        load_params(file)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.alpha=1.5", r"train\.alpha=1\.5 is refused: .* less than or equal to 1"),
        ("train.targets=offline", r"train\.targets='offline' is refused: .*'cached'"),
        ("prepare.shard_rows=40", "shard_rows=40 must be a multiple of chunk_rows=32"),
        ("prepare.temperatures=[1,1]", "repeat"),
        ("prepare.k=0", "k=0 and num_sampled=0 keep nothing"),
        ("prepare.top_p=0", "prepare.top_p=0 is refused"),
        ("prepare.top_p=1.01", "less than or equal to 1"),
        ("prepare.entropy_quantile=1", "less than 1"),
        ("prepare.k=-1", r"prepare\.k=-1 is refused"),
        ("paths.logits=ftp://host/x", "scheme ftp:// is not known"),
        ("paths.logits=s3://", "s3:// names no bucket"),
        ("prepare.temperatures=[1,1e-30]", "greater than or equal to 0.01"),
        ("seed=-1", r"seed=-1 is refused"),
        ("train.betas=[0.9,1.0]", r"train\.betas\.1=1\.0 is refused: .* less than 1"),
        ("train.learning_rate=inf", r"train\.learning_rate=inf is refused: .* finite"),
        ("train.learning_rate=0.00005", "min_learning_rate=0.0001 is above learning_rate=5e-05"),
        ("train.steps=many", r"train\.steps='many' is refused"),
        ("train.nothing=1", r"train\.nothing is not a known key"),
        ("seed.deeper=1", "seed is not a section"),
        ("student.lora={rnk:8}", r"student\.lora\.rnk is not .* did you mean student\.lora\.rank"),
        ("train.k.deeper=1", r"train\.k is refused: input should be a valid integer"),
        ("train.temperature=1,2", "names several values: `dvc exp run --queue -S`"),
        ("nonsense", r"--set 'nonsense' is not of the form key\.path=value"),
    ],
)
def test_bad_overrides_are_one_sentence(override: str, message: str) -> None:
    with pytest.raises(ParamsError, match=message) as caught:
        load_params(FILE, [override])
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_overrides_follow_dvcs_syntax() -> None:
    params = load_params(
        FILE,
        [
            "train.temperature=2",
            "train.k=null",
            "student.layers=[1,2]",
            "teacher.source=hub",
            "teacher.hub.id=Qwen/Qwen2.5-0.5B",
            "train.learning_rate=1e-4",
            "corpus.files={paths:[a.txt],column:body}",
            "student.lora={rank:8,alpha:16,dropout:0.1,targets:[q_proj]}",
        ],
    )
    assert params.train.temperature == 2.0
    assert params.student.layers == (1, 2)
    assert params.teacher.hub.id == "Qwen/Qwen2.5-0.5B"
    assert params.train.learning_rate == 1e-4
    assert params.corpus.files.column == "body"
    assert params.student.lora is not None
    assert params.student.lora.targets == ("q_proj",)


@pytest.mark.parametrize("content", [b"", b"- a list", b"train: {alpha: [", b"seed: \xff"])
def test_files_that_hold_no_params(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes(content)
    with pytest.raises(ParamsError) as caught:
        load_params(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(ParamsError, match="cannot be read"):
        load_params(tmp_path / "absent.yaml")
