"""Decode one new token per row through all layers, as fast as possible.

`StudentModel` computes the same result (tests/generation/test_decode.py), module by module. For a
single token, the modules themselves and the reshaping between them take longer than the arithmetic
of a small model, and on a CPU half of the remaining time is lost in products that read weights at
half the memory's speed. So this file writes the layers out again as plain operations on their
weights. A change in `pipeline/model/decoder.py` must be made here too.

Why it exists: in float32 (SmolLM2-135M's shape, one or two AVX2 cores, after 64 tokens) the
decoder's ordinary forward with its KV cache takes 1.11 to 1.17 times as long per token at batch 1
and 1.04 to 1.06 times at batch 8 (`one_decoder` in tests/benchmarks/model_speed.py). Using
`F.rms_norm`, grouped queries and other products within the decoder left batch 1 at 1.12 to 1.16.

Shapes: B rows, D hidden, H query heads, G key/value heads, E head size, V vocabulary rows. If B is
1, hidden states are vectors [D].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.model.decoder import RMSNorm, StudentModel, TransformerBlock
from pipeline.model.kv_cache import KVCache, LayerCache

_FEW = 32
"""Rows up to which W x^T beats x W^T in bfloat16 on a CPU (tests/benchmarks/model_speed.py)."""


_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All but cuDNN's, which H100 and newer GPUs prefer, and which builds a new graph for each number
of keys, that is for each token."""


class DecodeStep:
    """Decoding of the next token of each row of a cache.

    Weights are looked up once, so make one instance per text and do not keep it while they change.

    Args:
        student: on any device, in any dtype; its projections must be plain `nn.Linear`.
        cache: already holds the tokens read so far.
    """

    def __init__(self, student: StudentModel, cache: KVCache) -> None:
        self.config, self.cache = student.config, cache
        self.rotary = student.model.rotary
        self.layers = [_Layer.of(block) for block in student.model.layers]
        self.embedding = student.model.embed_tokens.weight
        self.norm, self.head = student.model.norm.weight, student.head_weight

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Map tokens, int64 [B], to logits [B, V] of the next tokens, in the model's dtype."""
        with sdpa_kernel(_KERNELS):
            return self._logits(tokens)

    def _logits(self, tokens: Tensor) -> Tensor:
        mask = self.cache.mask(1)
        cos, sin = self.rotary(self.cache.positions(1))
        half = self.config.head_size // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)  # signs of the halves in `rotate`
        cos, sin = cos.to(self.embedding.dtype), sin.to(self.embedding.dtype)
        x = F.embedding(tokens[0] if len(tokens) == 1 else tokens, self.embedding)
        for layer, kept in zip(self.layers, self.cache.layers, strict=True):
            x = self._attend(x, layer, cos, sin, mask, kept)
            h = self._normalise(x, layer.norm_2)
            h = F.silu(product(h, layer.gate)) * product(h, layer.up)
            x = product(h, layer.down, add=x)
        return product(self._normalise(x, self.norm), self.head).view(len(tokens), -1)

    def _attend(
        self,
        x: Tensor,
        layer: _Layer,
        cos: Tensor,
        signed_sin: Tensor,
        mask: Tensor | None,
        kept: LayerCache,
    ) -> Tensor:
        """Return x plus its attention output; a key/value head's query heads act as its queries."""
        heads, groups, size = self.config.num_heads, self.config.num_kv_heads, self.config.head_size
        h = self._normalise(x, layer.norm_1)
        q, k = product(h, layer.q, add=layer.q_bias), product(h, layer.k, add=layer.k_bias)
        v = product(h, layer.v, add=layer.v_bias).view(-1, groups, 1, size)
        both = torch.cat((q, k), -1).view(-1, heads + groups, 1, size)
        if layer.qk_norm is not None:
            both = F.rms_norm(both, (size,), None, self.config.norm_eps) * layer.qk_norm
        both = torch.addcmul(both * cos, both.roll(size // 2, -1), signed_sin)
        keys, values = kept.append(both[:, heads:], v)
        q = both[:, :heads].view(-1, groups, heads // groups, size)
        mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return product(mixed.reshape(*x.shape[:-1], -1), layer.o, add=x)

    def _normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.norm_eps)


def product(x: Tensor, weight: Tensor, *, add: Tensor | None = None) -> Tensor:
    """Return W x + add for a vector x [D], or for each row of x [B, D].

    Args:
        weight: W [out, D].
        add: [out], or [B, out] for rows.
    """
    if x.ndim == 1:
        return torch.mv(weight, x) if add is None else torch.addmv(add, weight, x)
    if x.is_cpu and x.dtype == torch.bfloat16 and len(x) <= _FEW:
        if add is None:
            return torch.mm(weight, x.t()).t()
        return torch.addmm(add.t() if add.ndim == 2 else add[:, None], weight, x.t()).t()
    return torch.mm(x, weight.t()) if add is None else torch.addmm(add, x, weight.t())


class _Layer(NamedTuple):
    """The parameters of a block; biases and `qk_norm` are None if the block has none.

    `qk_norm` [H + G, 1, E] is the weight of `q_norm` for each query head, then of `k_norm` for each
    key head.
    """

    norm_1: Tensor
    q: Tensor
    q_bias: Tensor | None
    k: Tensor
    k_bias: Tensor | None
    v: Tensor
    v_bias: Tensor | None
    qk_norm: Tensor | None
    o: Tensor
    norm_2: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor

    @classmethod
    def of(cls, block: nn.Module) -> _Layer:
        assert isinstance(block, TransformerBlock)
        attention, mlp = block.self_attn, block.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        assert all(type(p) is nn.Linear for p in (*projections, *mlp.children())), (
            "adapters must be merged first"
        )
        normalised = (attention.q_proj, attention.q_norm), (attention.k_proj, attention.k_norm)
        by_head = [
            norm.weight.expand(projection.out_features // attention.head_size, 1, -1)
            for projection, norm in normalised
            if isinstance(norm, RMSNorm)
        ]
        return cls(
            norm_1=block.input_layernorm.weight,
            q=attention.q_proj.weight,
            q_bias=attention.q_proj.bias,
            k=attention.k_proj.weight,
            k_bias=attention.k_proj.bias,
            v=attention.v_proj.weight,
            v_bias=attention.v_proj.bias,
            qk_norm=torch.cat(by_head) if by_head else None,
            o=attention.o_proj.weight,
            norm_2=block.post_attention_layernorm.weight,
            gate=mlp.gate_proj.weight,
            up=mlp.up_proj.weight,
            down=mlp.down_proj.weight,
        )
