"""What a defect could have stored in place of sampled ids."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pipeline.targets.block_search import sample_by_inversion


def _at_temperature(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda w, u: sample_by_inversion(w.pow(1.0 / temperature), u.flatten(0, 1))


def _by(uniforms: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda w, u: sample_by_inversion(w, uniforms(u).expand_as(u).flatten(0, 1))


SAMPLING_FAULTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "uniform": lambda w, u: (w > 0).float().multinomial(u.shape[-1], replacement=True),
    "the next most probable ids": lambda w, u: w.topk(u.shape[-1]).indices,
    "temperature 0.5": _at_temperature(0.5),
    "temperature 2": _at_temperature(2.0),
    "one draw repeated": _by(lambda u: u[..., :1]),
    "the same random numbers everywhere": _by(lambda u: u[:1, :1]),
    "the same random numbers at each position of a row": _by(lambda u: u[:, :1]),
    "the same random numbers in each row": _by(lambda u: u[:1]),
    "a neighbour's ids": lambda w, u: sample_by_inversion(w.roll(1, 0), u.flatten(0, 1)),
}
"""From weights [n, V], 0 at ids that are kept, and uniforms [rows, L, M] to ids [n, M]."""
