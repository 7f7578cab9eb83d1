from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.config.params import load_params
from pipeline.errors import ParamsError
from tests.conftest import ROOT

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


def test_missing_key_is_named(tmp_path: Path) -> None:
    file = changed(tmp_path, lambda v: v["train"].pop("alpha"))
    with pytest.raises(ParamsError, match=r"the key train\.alpha is missing"):
        load_params(file)


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
        ("student.lora={rnk:8}", r"student\.lora\.rank is missing"),
        ("student.lora.rank=8", r"student\.lora is not a section"),
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
