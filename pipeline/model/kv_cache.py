"""Keys and values of what a model has read, kept so that each is computed once.

One tensor [layers, 2, B, G, max_len, E] is made before the first token; index 0 of its second axis
are keys (rotated), 1 are values. Nothing is concatenated or moved while text grows: prefill writes
positions 0..L-1, each decoded token the next one, and attention looks at a view of what is filled.

Rows of different lengths are padded on the LEFT, so that all rows end, and go on, at the same
place. `padding` says how many positions of each row are not its own: they are masked out as keys,
and positions are counted from the first real token (`cumsum(attention_mask) - 1`, as Hugging Face
counts them), so a row's logits are what it would get alone.

Shapes: B batch, L new positions, S positions filled after them, G key/value heads, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import ParamsError


class LayerCache:
    """Keys and values of one layer: views of a `KVCache`."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values  # [B, G, max_len, E] each
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, G, L, E] behind what is there; return all of it, [B, G, S, E] views."""
        start, count = self.length, keys.shape[2]
        self.keys.narrow(2, start, count).copy_(keys)
        self.values.narrow(2, start, count).copy_(values)
        self.length = start + count
        return self.keys.narrow(2, 0, self.length), self.values.narrow(2, 0, self.length)


class KVCache:
    """The cache of all layers, for a batch that is read from its beginning.

    Args:
        num_layers, batch_size, num_kv_heads, max_len, head_size: the axes of `tensor`.
        dtype, device: those of the keys, which are the model's.
        attention_mask: bool or 0/1 integers [B, L] of the padded prompts, 1 at real tokens; None
            where nothing is padded.

    Raises:
        ParamsError: padding that is not on the left, or a row of nothing else.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        max_len: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
        attention_mask: Tensor | None = None,
    ) -> None:
        shape = (num_layers, 2, batch_size, num_kv_heads, max_len, head_size)
        # Zeros, since a masked value is multiplied by 0, and 0 x NaN is NaN.
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        self.layers = [LayerCache(layer[0], layer[1]) for layer in self.tensor]
        self.max_len = max_len
        self.padding = None if attention_mask is None else _left_padding(attention_mask, batch_size)

    @property
    def length(self) -> int:
        """S, positions filled, padding included."""
        return self.layers[-1].length

    def positions(self, count: int) -> Tensor:
        """Where the next `count` tokens stand in their texts: int64 [1 or B, count], from 0.

        Raises:
            ParamsError: there is no room for them.
        """
        if self.length + count > self.max_len:
            raise ParamsError(
                f"{self.length} + {count} tokens exceed the {self.max_len} that the KV cache was "
                "made for: make it with a larger max_len"
            )
        index = torch.arange(self.length, self.length + count, device=self.tensor.device)[None]
        return index if self.padding is None else (index - self.padding[:, None]).clamp_(min=0)

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these, int64 [B'], in their order: copies what is kept."""
        length = self.length
        self.tensor = self.tensor[:, :, rows]
        self.layers = [LayerCache(layer[0], layer[1]) for layer in self.tensor]
        for layer in self.layers:
            layer.length = length
        if self.padding is not None:
            self.padding = self.padding[rows]

    def mask(self, count: int) -> Tensor | None:
        """Which keys the next `count` queries may see; None where that is plain causal attention.

        That is so without padding, for the first tokens (all keys are new) and for a single one
        (all keys are before it). Else bool [1 or B, 1, count, S]. A padded query sees itself: an
        empty row would come out as NaN.
        """
        start, end = self.length, self.length + count
        if self.padding is None and (start == 0 or count == 1):
            return None
        key = torch.arange(end, device=self.tensor.device)
        query = key[start:, None]
        if self.padding is None:
            return (key <= query)[None, None]
        real = key >= self.padding[:, None, None, None]
        return ((key <= query) & real) | (key == query)


def _left_padding(attention_mask: Tensor, batch_size: int) -> Tensor | None:
    """int64 [B], zeros at the beginning of each row; None where there are none at all."""
    mask = attention_mask.bool()
    if mask.ndim != 2 or len(mask) != batch_size:
        raise ParamsError(
            f"attention_mask has shape {tuple(mask.shape)}: give [{batch_size}, L], a row a prompt"
        )
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()) or not bool(mask[:, -1].all()):
        raise ParamsError("attention_mask has a 0 behind a 1, or no 1: pad prompts on the left")
    padding = (~mask).sum(1)
    return padding if bool(padding.any()) else None
