"""Keys and values of the tokens that a model has read, cached so that each is computed once.

One tensor [layers, 2, B, G, max_len, E] is allocated before the first token; index 0 of its second
axis holds keys (rotated), index 1 values. Nothing is concatenated or moved while the text grows:
prefill writes positions 0..L-1, each decoded token writes the next one, and attention reads a view
of the filled part.

Rows of different lengths are padded on the LEFT, so that all rows end, and continue, at the same
position. `padding` is the number of padded positions in each row. They are masked out as keys, and
positions are counted from the first real token (`cumsum(attention_mask) - 1`, as Hugging Face
counts them), so a row gets the same logits as it would alone.

Shapes: B batch, L new positions, S positions filled after them, G key/value heads, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import ParamsError


class LayerCache:
    """Keys and values of one layer, as views of a `KVCache`."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values  # [B, G, max_len, E] each
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, G, L, E] after the filled part; return all of it as [B, G, S, E] views."""
        start, count = self.length, keys.shape[2]
        self.keys.narrow(2, start, count).copy_(keys)
        self.values.narrow(2, start, count).copy_(values)
        self.length = start + count
        return self.keys.narrow(2, 0, self.length), self.values.narrow(2, 0, self.length)


class KVCache:
    """The cache of all layers, for a batch that is read from its beginning.

    Args:
        num_layers, batch_size, num_kv_heads, max_len, head_size: the axes of `tensor`.
        dtype, device: those of the model, and so of the keys.
        attention_mask: bool or 0/1 integers [B, L] of the padded prompts, 1 at real tokens; None
            if nothing is padded.

    Raises:
        ParamsError: padding is not on the left, or a row contains only padding.
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
        # The tensor starts as zeros because a masked value is multiplied by 0, and 0 x NaN is NaN.
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        self.layers = [LayerCache(layer[0], layer[1]) for layer in self.tensor]
        self.max_len = max_len
        self.padding = None if attention_mask is None else _left_padding(attention_mask, batch_size)

    @property
    def length(self) -> int:
        """S, the number of filled positions, including padding."""
        return self.layers[-1].length

    def positions(self, count: int) -> Tensor:
        """Return the positions of the next `count` tokens: int64 [1 or B, count], from 0.

        Raises:
            ParamsError: the cache has no room for them.
        """
        if self.length + count > self.max_len:
            raise ParamsError(
                f"{self.length} + {count} tokens exceed the {self.max_len} that the KV cache was "
                "made for: make it with a larger max_len"
            )
        index = torch.arange(self.length, self.length + count, device=self.tensor.device)[None]
        return index if self.padding is None else (index - self.padding[:, None]).clamp_(min=0)

    def keep(self, rows: Tensor) -> None:
        """Keep only the given rows, int64 [B'], in their order; this copies what is kept."""
        length = self.length
        self.tensor = self.tensor[:, :, rows]
        self.layers = [LayerCache(layer[0], layer[1]) for layer in self.tensor]
        for layer in self.layers:
            layer.length = length
        if self.padding is not None:
            self.padding = self.padding[rows]

    def mask(self, count: int) -> Tensor | None:
        """Return which keys the next `count` queries may see; None for plain causal attention.

        Plain causal attention applies without padding, for the first tokens (all keys are new) and
        for a single token (all keys precede it). Otherwise the mask is bool [1 or B, 1, count, S].
        A padded query sees itself, because an empty row would give NaN.
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
    """Return int64 [B], the number of leading zeros per row, or None if there are none at all."""
    mask = attention_mask.bool()
    if mask.ndim != 2 or len(mask) != batch_size:
        raise ParamsError(
            f"attention_mask has shape {tuple(mask.shape)}: give [{batch_size}, L], one row "
            "per prompt"
        )
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()) or not bool(mask[:, -1].all()):
        raise ParamsError("attention_mask has a 0 after a 1, or no 1: pad prompts on the left")
    padding = (~mask).sum(1)
    return padding if bool(padding.any()) else None
