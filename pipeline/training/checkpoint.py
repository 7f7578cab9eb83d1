"""Checkpoints: everything a run needs to continue exactly, written atomically, checked when read.

A checkpoint `step_<n>` is a folder of

    __<rank>_<i>.distcp, .metadata   tensors, sharded: see sharded.py
    state.json                       step, skipped steps, history, number of ranks
    complete.json                    length and crc32c of each of the above; written last

The place in the data needs no storing: it follows from the step.

On a disk (which all ranks share), the folder takes its name only when complete. In an object store,
each rank copies the files it wrote there, in parts that fit a request, and complete.json comes
last: without it there is no checkpoint. The newest two are kept. One that does not match its
checksums is named and passed over.
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
from pipeline.files import fsync, open_file
from pipeline.runtime.console import say
from pipeline.sharding import DamagedError, Number, Size, parse
from pipeline.storage import MARK, Address, Url, open_folder
from pipeline.training.parallel import ALONE, Ranks
from pipeline.training.sharded import Learner, read_tensors, write_tensors

Kind = TypeVar("Kind")
_KEEP = 2
_STATE = "state.json"
_COMPLETE = "complete.json"
_PART = 64 * 2**20  # bytes an object: a request has to end within storage.py's time limit


@dataclass
class TrainState:
    """What changes while training, apart from tensors."""

    step: int = 0  # optimizer steps done
    skipped: int = 0  # of those, dropped for a non-finite loss or gradient
    history: list[dict[str, float]] = field(default_factory=list)  # what was logged, with "step"
    best_step: int | None = None  # of the lowest validation loss, with train.keep_best
    best_loss: float | None = None


@dataclass
class _Saved(TrainState):
    """state.json."""

    ranks: Size = 1


@dataclass
class _Listed:
    """complete.json: bytes and crc32c of each file."""

    files: dict[str, tuple[Number, str]]


class Checkpoints:
    """The checkpoints of one run, in a folder or under a prefix of an object store.

    `save` and `load_newest` are called by all ranks together.

    Args:
        start_again: where there are checkpoints and none is whole, begin at step 0 instead of
            refusing.
    """

    def __init__(
        self, address: Address, ranks: Ranks = ALONE, *, start_again: bool = False
    ) -> None:
        self.address = address
        self._ranks = ranks
        self._start_again = start_again
        self._folder = open_folder(address)

    def names(self) -> list[str]:
        """Complete checkpoints, oldest first."""
        return sorted(
            key.partition("/")[0] for key in self._folder.sizes() if key.endswith(f"/{_COMPLETE}")
        )

    def save(self, learner: Learner, state: TrainState) -> None:
        """Write the checkpoint of `state.step` and drop all but the newest two.

        Raises:
            DecantError, OSError: a disk is full, and the like.
        """
        name = f"step_{state.step:08d}"
        with self._new(name) as folder:
            own = write_tensors(folder, learner, self._ranks)
            self._upload(name, own)
            sums = self._ranks.gather({file.name: _sum(file) for file in own})
            self._ranks.on_first(lambda: self._complete(name, folder, sums, state))

    def load_newest(self, learner: Learner) -> TrainState | None:
        """Restore the learner and the random state in place; None if there is nothing.

        Raises:
            DecantError: there are checkpoints, and none is whole.
        """
        for name in reversed(self._ranks.on_first(self._begun)):
            with self._local(name) as folder:
                damage = next(filter(None, self._ranks.gather(self._damage(folder))), "")
                if not damage:
                    read_tensors(folder, learner, self._ranks)
                    return self._state(folder)
                say(f"checkpoint {self.address / name} is damaged ({damage}): it is passed over")
        if (names := self._ranks.on_first(self.names)) and not self._start_again:
            raise DecantError(
                f"none of the checkpoints {', '.join(names)} in {self.address} is whole: put back "
                "a copy of one, or start again with --overwrite"
            )
        return None

    def _state(self, folder: Path) -> TrainState:
        state = _read(folder / _STATE, _Saved)
        if (before := state.ranks) != self._ranks.count:
            say(
                f"{before} ranks saved what {self._ranks.count} continue: losses stay the same "
                "within rounding where student.dropout is 0; dropped units follow the rank"
            )
        return TrainState(
            **{field.name: getattr(state, field.name) for field in fields(TrainState)}
        )

    def remove(self) -> None:
        """Delete all of them, and what says which run they are of; nothing else that lies there."""
        for name in self._begun():
            self._drop(name)
        if not isinstance(self.address, Url):
            _remove_partial(self.address)
        self._folder.remove("run.json")
        self._folder.remove(MARK)
        if not isinstance(self.address, Url) and self.address.is_dir():
            with suppress(OSError):  # not empty: something else lies there
                self.address.rmdir()

    def _begun(self) -> list[str]:
        """Checkpoints of which there is anything, complete or not, oldest first."""
        found = {key.partition("/")[0] for key in self._folder.sizes() if "/" in key}
        return sorted(name for name in found if re.fullmatch(r"step_\d{8}", name))

    def _drop(self, name: str) -> None:
        self._folder.remove(f"{name}/{_COMPLETE}")  # first: what is half-deleted is not there
        self._folder.remove(name)

    @contextmanager
    def _new(self, name: str) -> Iterator[Path]:
        """An empty folder to write into: of all ranks on a disk, each one's own for a store."""
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
        """On rank 0, when all tensors are written: the rest, the marker, the name."""
        rest = [folder / ".metadata", folder / _STATE]
        rest[1].write_text(json.dumps(asdict(state) | {"ranks": self._ranks.count}))
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
            self._drop(name)  # a damaged one of the same step
            folder.rename(self.address / name)
            fsync(self.address)
        kept = [other for other in self.names() if other <= name][-_KEEP:]
        for other in self._begun():  # what is newer was passed over
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
        """The checkpoint as a folder; from an object store, a copy for each rank."""
        if not isinstance(self.address, Url):
            yield self.address / name
            return
        with tempfile.TemporaryDirectory() as scratch:
            for key in sorted(self._folder.sizes(name)):  # parts of a file in order
                with (Path(scratch) / key.split("/")[1]).open("ab") as stream:
                    stream.write(self._folder.read(key))
            yield Path(scratch)

    def _damage(self, folder: Path) -> str:
        """What is wrong, in words; on a shared disk each rank looks at its share of the files."""
        shared = not isinstance(self.address, Url)
        return _damage(folder, self._ranks.rank, self._ranks.count) if shared else _damage(folder)


def _make_empty(folder: Path) -> None:
    _remove_partial(folder.parent)
    folder.mkdir(parents=True)


def _remove_partial(folder: Path) -> None:
    """Delete what killed processes left: checkpoints, and run.json, half-written."""
    for left_over in folder.glob("step_*.partial"):
        shutil.rmtree(left_over)
    for left_over in folder.glob(".run.json.*.partial"):
        left_over.unlink()


def _read(file: Path, kind: type[Kind]) -> Kind:
    """A small JSON file of ours, its values of the right types.

    Raises:
        DamagedError: it is not.
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
    """Length in bytes and crc32c in hexadecimal."""
    total, length = 0, 0
    with open_file(file) as stream:
        while block := stream.read(2**20):
            total = google_crc32c.extend(total, block)
            length += len(block)
    return [length, f"{total:08x}"]


def _damage(folder: Path, rank: int = 0, ranks: int = 1) -> str:
    """The first of this rank's share of files that differs from the marker; empty if none does."""
    try:
        listed = _read(folder / _COMPLETE, _Listed).files
        entries = sorted(listed.items())
        unlisted = [e for e in sorted(os.scandir(folder), key=lambda e: e.name) if not e.is_file()]
        if unlisted:  # a pipe, for example, from which reading would never end
            return f"{unlisted[0].name} is no file"
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
