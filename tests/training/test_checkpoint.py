"""Checkpoints: whole or passed over by name, and a run that any number of kills cannot change."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from pipeline.config.params import Params
from pipeline.errors import DecantError
from pipeline.io.ownership import MARK
from pipeline.runtime.ranks import Ranks
from pipeline.training.checkpoint import Checkpoints, TrainState, _damage, _sum
from pipeline.training.dist_checkpoint import Learner, _MetadataUnpickler
from pipeline.training.run import run_training
from tests.helpers import SMALL, assert_same_run, change
from tests.training.ranks import train_stage
from tests.waiting import PATIENCE


def make_learner() -> Learner:
    torch.manual_seed(0)
    module = nn.Linear(6, 5)
    return Learner(module, torch.optim.AdamW(module.parameters(), fused=True))


def take_step(learner: Learner) -> None:
    """One whose gradient depends on the random state."""
    learner.student(torch.rand(3, 6)).square().sum().backward()
    learner.optimizer.step()
    learner.optimizer.zero_grad()


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    """After each of three steps; the newest two are left."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    learner = make_learner()
    for step in (1, 2, 3):
        take_step(learner)
        checkpoints.save(learner, TrainState(step, 0, [{"step": float(step)}]))
    return checkpoints


def test_what_is_restored_goes_on_as_if_nothing_had_been(saved: Checkpoints) -> None:
    assert saved.names() == ["step_00000002", "step_00000003"]
    learner = make_learner()
    for _ in range(5):
        take_step(learner)
    other = make_learner()
    torch.rand(99)
    state = saved.load_newest(other)
    assert state == TrainState(3, 0, [{"step": 3.0}])
    for _ in range(2):
        take_step(other)
    for one, two in zip(learner.student.parameters(), other.student.parameters(), strict=True):
        assert torch.equal(one, two)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    place = random.Random(file.name).randrange(8 * len(data))
    data[place // 8] ^= 1 << place % 8
    file.write_bytes(data)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def make_longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" ")


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("hurt", [flip_a_bit, cut_short, make_longer, empty, Path.unlink])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json", "complete.json"])
def test_a_damaged_one_is_named_and_the_one_before_it_used(
    name: str, hurt: Callable[[Path], None], saved: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    if (name, hurt) == ("complete.json", make_longer):
        return  # a space behind the JSON changes nothing
    hurt(Path(saved.address) / "step_00000003" / name)
    learner = make_learner()
    state = saved.load_newest(learner)
    said = capsys.readouterr().out
    culprit = "" if (name, hurt) == ("complete.json", flip_a_bit) else name
    assert f"checkpoint {saved.address}/step_00000003 is damaged ({culprit}" in said
    assert state is not None
    assert state.step == 2
    # What was passed over is newer than what comes next, and is not counted among the newest two.
    saved.save(learner, TrainState(2))
    assert saved.names() == ["step_00000002"]


def test_any_bit_of_the_marker(saved: Checkpoints) -> None:
    folder = Path(saved.address) / "step_00000003"
    marker = folder / "complete.json"
    whole = marker.read_bytes()
    assert _damage(folder) == ""
    for place in range(8 * len(whole)):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        marker.write_bytes(data)
        assert _damage(folder), (place, data)


class MakesAFolder:
    """Pickled, it is a call of os.mkdir when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_metadata_that_names_what_it_should_not_is_refused(
    saved: Checkpoints, tmp_path: Path
) -> None:
    """With checksums that are right: whoever writes a checkpoint writes those too."""
    folder = Path(saved.address) / "step_00000003"
    data = pickle.dumps(MakesAFolder(tmp_path / "made"))
    (folder / ".metadata").write_bytes(data)
    marker = json.loads((folder / "complete.json").read_text())
    marker["files"][".metadata"] = _sum(folder / ".metadata")
    (folder / "complete.json").write_text(json.dumps(marker))
    with pytest.raises(DecantError, match=rf"step_00000003/\.metadata names {os.name}\.mkdir,"):
        saved.load_newest(make_learner())
    assert not (tmp_path / "made").exists()
    pickle.loads(data)
    assert (tmp_path / "made").exists()  # PyTorch's own reader would have made it


class Attribute:
    """Pickled, it is a call of getattr when it is read."""

    def __init__(self, owner: Any, name: str) -> None:
        self.words = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.words


def test_getattr_in_metadata_gives_members_of_enums_alone() -> None:
    """As Python 3.11.2 pickles them; of anything else it would be a way to any function."""

    def read(owner: Any, name: str) -> Any:
        return _MetadataUnpickler(io.BytesIO(pickle.dumps(Attribute(owner, name)))).load()

    member = _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    assert read(_MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST") is member
    for owner, name in ((torch.Size, "count"), (_MEM_FORMAT_ENCODING, "mro")):
        with pytest.raises(pickle.UnpicklingError, match=r"builtins\.getattr"):
            read(owner, name)


def test_without_a_whole_one_it_is_refused_or_begun_again(saved: Checkpoints) -> None:
    for name in saved.names():
        cut_short(Path(saved.address) / name / "state.json")
    learner = make_learner()
    with pytest.raises(DecantError, match=r"step_00000002, step_00000003 .* --overwrite"):
        saved.load_newest(learner)
    assert Checkpoints(saved.address, start_again=True).load_newest(learner) is None


def test_frozen_parameters_are_not_saved(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for frozen in (False, True):
        module = nn.Sequential(nn.Linear(1000, 100), nn.Linear(2, 2))
        module[0].requires_grad_(not frozen)
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
        checkpoints.save(Learner(module, optimizer), TrainState(int(frozen)))
    sizes = [sum(f.stat().st_size for f in (tmp_path / n).iterdir()) for n in checkpoints.names()]
    assert sizes[0] > 400_000
    assert sizes[1] < 20_000


def test_what_a_kill_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    """A folder of a checkpoint, and a file: run.json lies there too."""
    (tmp_path / "step_00000001.partial").mkdir()
    (tmp_path / ".run.json.0123.partial").write_text("{")
    Checkpoints(tmp_path).save(make_learner(), TrainState(2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000002"]


class RanksOfTwoMachines(Ranks):
    """Rank 0, whose peer has written its file to a disk of its own."""

    def gather(self, value: Any) -> list[Any]:
        return [value, {"__1_0.distcp": [8, "00000000"]}]


def test_a_disk_that_ranks_do_not_share_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, RanksOfTwoMachines(torch.device("cpu")))
    with pytest.raises(DecantError, match=r"__1_0\.distcp, .* is not seen by rank 0: give all"):
        checkpoints.save(make_learner(), TrainState(1))
    assert list(tmp_path.iterdir()) == []


def train_run(params: Params, name: str) -> None:
    torch.set_num_threads(1)
    run_training(params, name)


def test_thirty_kills_change_nothing(
    forkserver: ForkServerContext, tiny_cache: Params, tmp_path: Path
) -> None:
    """SIGKILL at random moments; most of a run's time goes into writing its checkpoints."""
    student = {"init": "random"} | SMALL | {"dropout": 0.1}
    train = {"steps": 40, "eval_every": 20}
    params = change(tiny_cache, student=student, train=train, run={"checkpoint_every": 1})
    runs, chance = params.paths.runs, random.Random(0)
    kills, while_writing, moments = 0, 0, set()
    number = 0
    while kills < 30:
        folder = runs / f"killed{number}" / "checkpoints"
        process = forkserver.Process(target=train_run, args=(params, f"killed{number}"))
        process.start()
        # By turns at any moment from its start on, in the middle of writing, after progress.
        if kills % 3 == 0:
            process.join(chance.uniform(0.0, 0.5))
        elif kills % 3 == 1:
            while process.is_alive() and not any(folder.glob("step_*.partial")):
                process.join(0.0005)
        else:
            newest = Checkpoints(folder).names()[-1:]
            while process.is_alive() and Checkpoints(folder).names()[-1:] == newest:
                process.join(0.002)
            process.join(chance.uniform(0.0, 0.05))
        process.kill()
        process.join()
        if process.exitcode == 0:  # a finished run cannot be hurt: begin another
            number += 1
            continue
        kills += 1
        while_writing += any(folder.glob("step_*.partial"))
        names = Checkpoints(folder).names()
        moments.update(names[-1:])
        assert all(_damage(folder / name) == "" for name in names)
    assert len(moments) > 5
    assert while_writing
    train_run_in(forkserver, params, f"killed{number}")
    train_run_in(forkserver, params, "whole")
    for finished in range(number + 1):
        assert_same_run(runs / f"killed{finished}", runs / "whole")


def train_run_in(context: ForkServerContext, params: Params, name: str) -> None:
    process = context.Process(target=train_run, args=(params, name))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0


def small_disk(log: Path, *words: str) -> None:
    save = Checkpoints.save

    def save_beyond_the_limit(self: Checkpoints, *what: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))
        save(self, *what)

    Checkpoints.save = save_beyond_the_limit  # type: ignore[method-assign]
    train_stage(log, *words)


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    forkserver: ForkServerContext, tiny_cache: Params, tmp_path: Path
) -> None:
    words = ["--params", str(tmp_path / "params.yaml")]
    process = forkserver.Process(target=small_disk, args=(tmp_path / "log", *words))
    process.start()
    process.join(PATIENCE)
    printed = (tmp_path / "log" / "0").read_text()
    assert process.exitcode == 1, printed
    assert "Traceback" not in printed
    assert "make room" in printed
    folder = tiny_cache.paths.runs / "student" / "checkpoints"
    assert {file.name for file in folder.iterdir()} == {MARK, "run.json"}
