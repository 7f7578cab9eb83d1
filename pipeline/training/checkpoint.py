"""Checkpoints: everything a run needs to continue exactly, written atomically, checked when read.

A checkpoint `step_<step, eight digits>` is a folder of

    __<rank>_<i>.distcp, .metadata   tensors, sharded: see dist_checkpoint.py
    state.json                       step, skipped steps, history, loss scale, number of ranks
    complete.json                    length and crc32c of each of the above; written last

The position in the data is not stored, because it follows from the step.

On a disk (which all ranks share), the folder is renamed to its final name only when it is complete.
In an object store, each rank uploads the files that it wrote, in parts that fit a request, and
complete.json is written last: without it, the checkpoint does not count. The newest two checkpoints
are kept. A checkpoint that does not match its checksums is reported and skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c

from pipeline.errors import DecantError
from pipeline.io.address import Address, Url
from pipeline.io.checked_json import DamagedError, Number, Size, parse
from pipeline.io.files import fsync, open_file
from pipeline.io.folders import open_folder
from pipeline.io.ownership import MARK
from pipeline.runtime.console import say
from pipeline.runtime.ranks import ALONE, Ranks
from pipeline.training.dist_checkpoint import Learner, read_tensors, write_tensors
from pipeline.training.loss_scale import LossScale

Kind = TypeVar("Kind")
_KEEP = 2
_STATE = "state.json"
_COMPLETE = "complete.json"
# Bytes per object: a request must end within the time limit of io/object_store.py.
_PART = 64 * 2**20


@dataclass
class TrainState:
    """The part of a run's state that changes during training, apart from tensors."""

    step: int = 0  # optimizer steps done
    skipped: int = 0  # how many of those were dropped for a non-finite loss or gradient
    history: list[dict[str, float]] = field(default_factory=list)  # logged values, with "step"
    best_step: int | None = None  # step with the lowest validation loss, with train.keep_best
    best_loss: float | None = None
    loss_scale: LossScale | None = None  # only in float16; it counts steps dropped for overflow


@dataclass
class _Saved(TrainState):
    """The content of state.json."""

    ranks: Size = 1


@dataclass
class _Listed:
    """The content of complete.json: size in bytes and crc32c of each file."""

    files: dict[str, tuple[Number, str]]


class Checkpoints:
    """The checkpoints of one run, in a folder or under a prefix of an object store.

    All ranks must call `save` and `load_newest` together.

    Args:
        start_again: if there are checkpoints but all are damaged, begin at step 0 instead of
            raising.
    """

    def __init__(
        self, address: Address, ranks: Ranks = ALONE, *, start_again: bool = False
    ) -> None:
        self.address = address
        self._ranks = ranks
        self._start_again = start_again
        self._folder = open_folder(address)

    def names(self) -> list[str]:
        """Return the names of the complete checkpoints, oldest first."""
        return sorted(
            key.partition("/")[0] for key in self._folder.sizes() if key.endswith(f"/{_COMPLETE}")
        )

    def save(self, learner: Learner, state: TrainState) -> None:
        """Write the checkpoint of `state.step` and delete all but the newest two.

        Raises:
            DecantError, OSError: writing failed, for example because the disk is full.
        """
        name = f"step_{state.step:08d}"
        with self._new(name) as folder:
            own = write_tensors(folder, learner, self._ranks)
            self._upload(name, own)
            sums = self._ranks.gather({file.name: _sum(file) for file in own})
            self._ranks.on_first(lambda: self._complete(name, folder, sums, state))

    def load_newest(self, learner: Learner) -> TrainState | None:
        """Restore learner and random state in place; return None if there is nothing to restore.

        Raises:
            DecantError: there are checkpoints, but all are damaged.
        """
        for name in reversed(self._ranks.on_first(self._begun)):
            with self._local(name) as folder:
                damage = next(filter(None, self._ranks.gather(self._damage(folder))), "")
                if not damage:
                    read_tensors(folder, learner, self._ranks)
                    return self._state(folder)
                say(f"checkpoint {self.address / name} is damaged ({damage}): it is skipped")
        if (names := self._ranks.on_first(self.names)) and not self._start_again:
            raise DecantError(
                f"none of the checkpoints {', '.join(names)} in {self.address} is complete: "
                "restore a copy of one, or start again with --overwrite"
            )
        return None

    def _state(self, folder: Path) -> TrainState:
        state = _read(folder / _STATE, _Saved)
        if (before := state.ranks) != self._ranks.world_size:
            say(
                f"{before} ranks saved what {self._ranks.world_size} continue: losses stay the "
                "same within rounding where student.dropout is 0; dropped units follow the rank"
            )
        return TrainState(
            **{field.name: getattr(state, field.name) for field in fields(TrainState)}
        )

    def remove(self) -> None:
        """Delete all checkpoints and the files that identify their run, and nothing else."""
        for name in self._begun():
            self._drop(name)
        if not isinstance(self.address, Url):
            _remove_partial(self.address)
        self._folder.remove("run.json")
        self._folder.remove(MARK)
        if not isinstance(self.address, Url) and self.address.is_dir():
            with suppress(OSError):  # not empty: it holds something that is not ours
                self.address.rmdir()

    def _begun(self) -> list[str]:
        """Return the names of all checkpoints, including incomplete ones, oldest first."""
        found = {key.partition("/")[0] for key in self._folder.sizes() if "/" in key}
        return sorted(name for name in found if re.fullmatch(r"step_\d{8}", name))

    def _drop(self, name: str) -> None:
        self._folder.remove(f"{name}/{_COMPLETE}")  # first: a half-deleted one must not count
        self._folder.remove(name)

    @contextmanager
    def _new(self, name: str) -> Iterator[Path]:
        """Yield an empty folder to write into: on a disk one for all ranks, else one per rank."""
        if isinstance(self.address, Url):
            self._ranks.on_first(lambda: self._drop(name))
            with tempfile.TemporaryDirectory() as scratch:
                yield Path(scratch)
            return
        folder = self.address / f"{name}.partial"
        self._ranks.on_first(lambda: _make_empty(folder))
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _upload(self, name: str, files: list[Path]) -> None:
        if not isinstance(self.address, Url):
            return
        for file in files:
            with file.open("rb") as stream:
                for number, part in enumerate(iter(lambda: stream.read(_PART), b"")):
                    self._folder.write(f"{name}/{file.name}/{number:05d}", part)

    def _complete(
        self, name: str, folder: Path, sums: list[dict[str, Any]], state: TrainState
    ) -> None:
        """On rank 0, after all tensors are written, write the other files and the final name."""
        rest = [folder / ".metadata", folder / _STATE]
        rest[1].write_text(json.dumps(asdict(state) | {"ranks": self._ranks.world_size}))
        listed = {name: entry for part in sums for name, entry in part.items()}
        listed |= {file.name: _sum(file) for file in rest}
        self._require_shared(folder, listed)
        marker = json.dumps({"files": listed}, separators=(",", ":"))
        if isinstance(self.address, Url):
            self._upload(name, rest)
            self._folder.write(f"{name}/{_COMPLETE}", marker.encode())
        else:
            (folder / _COMPLETE).write_text(marker)
            for file in folder.iterdir():
                fsync(file)
            fsync(folder)
            self._drop(name)  # a damaged checkpoint of the same step
            folder.rename(self.address / name)
            fsync(self.address)
        kept = [other for other in self.names() if other <= name][-_KEEP:]
        for other in self._begun():  # newer ones were skipped as damaged
            if other not in kept:
                self._drop(other)

    def _require_shared(self, folder: Path, listed: dict[str, Any]) -> None:
        unseen = [name for name in listed if not (folder / name).exists()]
        if unseen and not isinstance(self.address, Url):
            raise DecantError(
                f"{unseen[0]}, written by another rank to {self.address}, is not seen by rank 0: "
                "give all machines one shared disk, or set paths.checkpoints to an object store"
            )

    @contextmanager
    def _local(self, name: str) -> Iterator[Path]:
        """Yield the checkpoint as a folder; from an object store, each rank gets a copy."""
        if not isinstance(self.address, Url):
            yield self.address / name
            return
        with tempfile.TemporaryDirectory() as scratch:
            for key in sorted(self._folder.sizes(name)):  # the parts of a file in order
                with (Path(scratch) / key.split("/")[1]).open("ab") as stream:
                    stream.write(self._folder.read(key))
            yield Path(scratch)

    def _damage(self, folder: Path) -> str:
        """Describe the damage, if any; on a shared disk each rank checks its share of the files."""
        shared = not isinstance(self.address, Url)
        return (
            _damage(folder, self._ranks.rank, self._ranks.world_size) if shared else _damage(folder)
        )


def _make_empty(folder: Path) -> None:
    _remove_partial(folder.parent)
    folder.mkdir(parents=True)


def _remove_partial(folder: Path) -> None:
    """Delete half-written checkpoints and run.json files that killed processes left behind."""
    for left_over in folder.glob("step_*.partial"):
        shutil.rmtree(left_over)
    for left_over in folder.glob(".run.json.*.partial"):
        left_over.unlink()


def _read(file: Path, kind: type[Kind]) -> Kind:
    """Read one of our small JSON files and check the types of its values.

    Raises:
        DamagedError: the file is missing, unreadable or has a value of another type.
    """
    try:
        with open_file(file) as stream:
            return parse(kind, json.loads(stream.read()), file.name)
    except FileNotFoundError:
        raise DamagedError(f"{file.name} is missing") from None
    except DamagedError:
        raise
    except (OSError, ValueError, RecursionError):
        raise DamagedError(f"{file.name} cannot be read") from None


def _sum(file: Path) -> list[Any]:
    """Return the file's size in bytes and its crc32c in hexadecimal."""
    total, length = 0, 0
    with open_file(file) as stream:
        while block := stream.read(2**20):
            total = google_crc32c.extend(total, block)
            length += len(block)
    return [length, f"{total:08x}"]


def _damage(folder: Path, rank: int = 0, ranks: int = 1) -> str:
    """Describe the first damaged file in this rank's share; return an empty text if none is."""
    try:
        listed = _read(folder / _COMPLETE, _Listed).files
        entries = sorted(listed.items())
        unlisted = [e for e in sorted(os.scandir(folder), key=lambda e: e.name) if not e.is_file()]
        if unlisted:  # a pipe, for example; reading it would never end
            return f"{unlisted[0].name} is not a file"
        if lost := {".metadata", _STATE} - listed.keys():
            return f"{_COMPLETE} does not list {min(lost)}"
        _read(folder / _STATE, _Saved)
    except DamagedError as error:
        return str(error)
    for file, entry in entries[rank::ranks]:
        try:
            found = _sum(folder / file)
        except FileNotFoundError:
            return f"{file} is missing"
        except (OSError, ValueError):
            return f"{file} cannot be read"
        if found != list(entry):
            return f"{file}, {found[0]} bytes, does not match its checksum"
    return ""
