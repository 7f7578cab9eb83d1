"""Write a run's tensors to a folder and read them back, by torch.distributed.checkpoint.

Each rank writes and reads its own shards. Tensor names depend neither on ranks nor on parameter
order nor on the engine, so any number of ranks can read what any other number wrote, and ddp can
read what fsdp wrote. A checkpoint holds the trainable parameters (frozen ones remain where the run
took them from), with train.keep_best also those of the lowest validation loss, the optimizer's
state and the random state of each rank.

The format's `.metadata` file is a pickle, which could name any function to be called; we read it
with an unpickler that knows a dozen names and calls nothing else.

The optimizer's state is addressed directly, not through torch.distributed.checkpoint.state_dict.
That module makes an optimizer without state take a step to create one, and saves a tied matrix
twice.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.serialization import _get_layout

from pipeline.errors import DecantError
from pipeline.runtime.ranks import Ranks


def _enum_member(owner: Any, name: str) -> Enum:
    """Replace `getattr`, by which some releases of Python pickle the members of an enum."""
    if isinstance(owner, type) and issubclass(owner, Enum) and name in owner.__members__:
        return owner[name]
    raise pickle.UnpicklingError(f"builtins.getattr of {owner!r}")


_IN_METADATA: dict[str, Any] = {
    f"{known.__module__}.{known.__qualname__}": known
    for known in (
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorStorageMetadata,
        metadata.TensorProperties,
        metadata.ChunkStorageMetadata,
        metadata._MEM_FORMAT_ENCODING,
        _StorageInfo,
        _get_layout,
        torch.Size,
    )
} | {  # Python 3.13 moved this class; each version must read what the other wrote
    f"{module}.{type(Path()).__name__}": type(Path()) for module in ("pathlib", "pathlib._local")
}
_IN_METADATA["builtins.getattr"] = _enum_member
"""The names that a checkpoint's `.metadata` consists of, besides dtypes."""


@dataclass(frozen=True)
class Learner:
    """The objects that a run changes on this rank: whole, or this rank's shards."""

    student: nn.Module
    optimizer: torch.optim.Optimizer
    best: dict[str, Tensor] = field(default_factory=dict)
    """Trainable parameters by name, as they were at the lowest validation loss; empty if unused."""

    def keep_as_best(self) -> None:
        """Copy the trainable parameters into `best`, on the same device."""
        for name, tensor in self._trained():
            if name in self.best:
                self.best[name].copy_(tensor)
            else:
                self.best[name] = tensor.clone()

    def restore_best(self) -> None:
        """Copy `best` back into the student."""
        for name, tensor in self._trained():
            tensor.copy_(self.best[name])

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.student.named_parameters():
            if parameter.requires_grad:
                yield name, parameter.detach()

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name; loading writes into them."""
        tensors = {f"best/{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.student.named_parameters():
            if parameter.requires_grad:
                tensors[f"student/{name}"] = parameter.detach()
                for key, value in self.optimizer.state[parameter].items():
                    tensors[f"optimizer/{key}/{name}"] = value
        return tensors

    def make_room(self, saved: dict[str, Any]) -> None:
        """Create tensors to load optimizer state and `best` into, sharded as the weights are."""
        parameters = dict(self.student.named_parameters())
        for full_name, about in saved.items():
            part, _, rest = full_name.partition("/")
            key, _, name = rest.partition("/")
            if part == "best":
                self.best[rest] = torch.zeros_like(parameters[rest].detach())
            if part == "optimizer":
                if name not in parameters or about.size not in (parameters[name].shape, ()):
                    raise DecantError(
                        f"a checkpoint holds {full_name} {tuple(about.size)}, which this student "
                        "does not have: delete that checkpoint"
                    )
                like, dtype = parameters[name].detach(), about.properties.dtype
                self.optimizer.state[parameters[name]][key] = (
                    torch.zeros_like(like, dtype=dtype)
                    if about.size == like.shape
                    else torch.zeros(about.size, dtype=dtype, device=like.device)
                )


def write_tensors(folder: Path, learner: Learner, ranks: Ranks) -> list[Path]:
    """Write this rank's shards and return its files; rank 0 also writes `.metadata`.

    All ranks must call this together.

    Raises:
        DecantError, OSError: writing failed, for example because the disk is full.
    """
    tensors = learner.tensors() | _random_state(ranks.rank)
    try:
        with _one_process_is_meant():
            save(tensors, storage_writer=FileSystemWriter(folder), no_dist=not ranks.grouped)
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, OSError):
                raise failure from None
            if "inline_container" in str(failure):  # how torch.save reports a short write
                raise DecantError(
                    f"{folder} cannot be written, the disk may be full: make room, and run the "
                    "same command to continue from the checkpoint before"
                ) from None
        raise
    return sorted(folder.glob(f"__{ranks.rank}_*"))


class _MetadataUnpickler(pickle.Unpickler):
    """An unpickler that calls nothing but the constructors in `_IN_METADATA`."""

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name in _IN_METADATA:
            return _IN_METADATA[full_name]
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(full_name)


class _Reader(FileSystemReader):
    def read_metadata(self, *_: Any, **__: Any) -> metadata.Metadata:
        """Read `.metadata`, allowing only names that belong there.

        Raises:
            DecantError: it holds another name.
        """
        file = Path(self.path, ".metadata")
        with file.open("rb") as stream:
            try:
                found = _MetadataUnpickler(stream).load()
            except Exception as error:  # constructors fail in their own ways on wrong arguments
                raise DecantError(
                    f"{file} names {error}, which no checkpoint of Decant's contains, so it is not "
                    "read: delete that checkpoint, and find out where it came from"
                ) from None
        if not _is_ours(found):
            raise DecantError(f"{file} does not describe Decant's tensors: delete that checkpoint")
        return found


def _is_ours(found: Any) -> TypeGuard[metadata.Metadata]:
    """Return whether the object describes tensors and where they are stored."""
    return (
        isinstance(found, metadata.Metadata)
        and isinstance(found.state_dict_metadata, dict)
        and isinstance(found.storage_data, dict)
        and all(
            isinstance(about, metadata.TensorStorageMetadata)
            and isinstance(about.size, torch.Size)
            and isinstance(about.properties, metadata.TensorProperties)
            and isinstance(about.properties.dtype, torch.dtype)
            for about in found.state_dict_metadata.values()
        )
    )


def read_tensors(folder: Path, learner: Learner, ranks: Ranks) -> None:
    """Restore in place, including the random state if this rank number had one when it was saved.

    Raises:
        DecantError: `.metadata` was not written by Decant, or the tensors do not fit this student.
    """
    reader = _Reader(folder)
    saved: dict[str, Any] = reader.read_metadata().state_dict_metadata
    learner.make_room(saved)
    random = {name: s for name, s in _random_state(ranks.rank).items() if name in saved}
    try:
        with _one_process_is_meant():
            load(learner.tensors() | random, storage_reader=reader, no_dist=not ranks.grouped)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise DecantError(
            f"{folder} does not hold this student ({' '.join(str(first).split())[:200]}): delete "
            "that checkpoint"
        ) from error
    for name, values in random.items():
        if name.startswith("random/cpu"):
            torch.set_rng_state(values)
        else:
            torch.cuda.set_rng_state(values)


def _random_state(rank: int) -> dict[str, Tensor]:
    """Return the random state of this rank under names that contain the rank."""
    state = {f"random/cpu/{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"random/cuda/{rank}"] = torch.cuda.get_rng_state()
    return state


@contextmanager
def _one_process_is_meant() -> Iterator[None]:
    """Hide PyTorch's warning that there is no process group, where that is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
