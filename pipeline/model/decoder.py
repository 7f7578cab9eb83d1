"""A decoder as Qwen2, Qwen3 and Llama have it, written to be read from top to bottom.

Parameter names are Hugging Face's, so a checkpoint of `Qwen2ForCausalLM`, `Qwen3ForCausalLM` or
`LlamaForCausalLM` loads without a rename map (see `pipeline/model/weights.py`), and the results
agree number by number (tests/model/test_decoder.py).

Shapes: B batch, L length, S keys (L, or all that the cache holds), D hidden, H query heads,
G key/value heads, E head size, F intermediate, V vocabulary rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import ParamsError
from pipeline.model.attention_mask import (
    Segments,
    attend_within,
    attention_within,
    document_positions,
    has_flash_attention,
)
from pipeline.model.kv_cache import KVCache, LayerCache
from pipeline.model.rope import RopeScaling, inverse_frequencies
from pipeline.model.student import Student
from pipeline.runtime.transfer import to_device


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Hyper-parameters of the student; the defaults give 123.4 M parameters.

    `vocab_size` is the number of embedding ROWS, which may exceed the number of tokenizer entries
    (Qwen2.5: 151,936 rows for 151,665 entries). `head_dim` is the width of a head, hidden_size /
    num_heads if it is None. `qk_norm` normalises each head's query and key before they are rotated
    (Dehghani et al. 2023, 2), as in Qwen3.
    """

    hidden_size: int = 512
    num_layers: int = 12
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int | None = None
    intermediate_size: int = 2048
    vocab_size: int = 151_936
    max_seq_len: int = 512
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    dropout: float = 0.0
    attention_bias: bool = True
    qk_norm: bool = False
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "vocab_size",
            "max_seq_len",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ParamsError(f"{name}={value} must be at least 1")
        # transformers refuses such a Llama whatever its head_dim.
        if self.hidden_size % self.num_heads and not (self.head_dim and self.qk_norm):
            raise ParamsError(
                f"hidden_size={self.hidden_size} must be divisible by num_heads={self.num_heads}, "
                "unless head_dim is a number and qk_norm is true"
            )
        if self.num_heads % self.num_kv_heads:
            raise ParamsError(
                f"num_heads={self.num_heads} must be divisible by num_kv_heads={self.num_kv_heads}"
            )
        if self.head_size % 2:
            name = "hidden_size / num_heads" if self.head_dim is None else "head_dim"
            raise ParamsError(f"{name} = {self.head_size} must be even, since RoPE rotates pairs")
        if not 0.0 <= self.dropout < 1.0:
            raise ParamsError(f"dropout={self.dropout} must lie in [0, 1)")

    @property
    def head_size(self) -> int:
        """E, the width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_heads


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, eq. 4).

    The mean SQUARE is normalised; the mean is not subtracted. Statistics are float32 whatever the
    input's dtype, and the product with `weight` is in the input's dtype, as in Hugging Face. On a
    GPU, PyTorch's fused kernel rounds once, after that product.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # one kernel instead of eight
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al. 2021, eq. 34), in Hugging Face's half-split layout.

    Dimension i is paired with i + E/2 (not with its neighbour) and turned by the angle
    position * f_i, where f_i = theta^(-2i/E) or a long-context variant's frequency
    (pipeline/model/rope.py).
    """

    inv_freq: Tensor

    def __init__(self, head_size: int, theta: float, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        self.frequencies = partial(inverse_frequencies, head_size, theta, scaling)
        self.register_buffer("inv_freq", self.frequencies(), persistent=False)
        self.amplitude = 1.0 if scaling is None else scaling.amplitude()

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Map positions, integers [B, L], to cos and sin, float32 [B, 1, L, E]."""
        # bfloat16 cannot count past 256, so angles stay float32 under autocast too.
        with torch.autocast(positions.device.type, enabled=False):
            angles = positions[..., None].float() * self.inv_freq
            angles = torch.cat((angles, angles), dim=-1)[:, None]
            return angles.cos() * self.amplitude, angles.sin() * self.amplitude

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow `to(device)`, but not `to(bfloat16)`: rounded frequencies give wrong angles."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.inv_freq = self.frequencies().to(self.inv_freq.device)
        return self


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [B, heads, L, E] by the angles of `RotaryEmbedding`, in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return torch.addcmul(x * cos.to(x.dtype), turned, sin.to(x.dtype))


class GQAAttention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023): H query heads share G key/value heads.

    o(softmax(q k^T / sqrt(E)) v) (Vaswani et al. 2017, eq. 1) by `scaled_dot_product_attention`;
    query head h reads key/value head h // (H / G), and q and k are rotated first, after `q_norm`
    and `k_norm` if the model has them. `attention_plain` computes the same, step by step.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.dropout = config.dropout
        q_size, kv_size = config.num_heads * self.head_size, config.num_kv_heads * self.head_size
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        norm: Callable[[], nn.Module] = nn.Identity
        if config.qk_norm:
            norm = partial(RMSNorm, self.head_size, config.norm_eps)
        self.q_norm, self.k_norm = norm(), norm()

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | Segments | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend from x [B, L, D] to x and to the cached tokens; return [B, L, D].

        Args:
            cos, sin: angles of the L positions, from `RotaryEmbedding`.
            mask: bool [1 or B, 1, L, S], True where a query may see a key; segments within which
                attention is causal; None if it is causal over the row.
            cache: the new keys and values are appended to it.
        """

        def heads(y: Tensor) -> Tensor:  # [B, L, heads * E] -> [B, L, heads, E]
            return y.view(*y.shape[:2], -1, self.head_size)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        # Norms give float32 under autocast, and kernels take q, k and v of one format.
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, heads, L, E]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(k, v)
        mixed = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return out


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Segments | None, dropout: float
) -> Tensor:
    """Attend with queries [B, H, L, E] to keys and values [B, G, S, E]; return [B, H, L, E].

    Without a mask, a single query sees all keys, and several queries see the keys up to their own
    position (then S = L). With a mask, it must include causality.
    """
    if isinstance(mask, Segments):
        return attend_within(q, k, v, mask)
    grouped = k.shape[1] != q.shape[1]
    if grouped and (mask is not None or not _has_grouped_kernel(q)):
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        grouped = False
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and q.shape[2] > 1,
        dropout_p=dropout,
        enable_gqa=grouped,
    )


def _has_grouped_kernel(q: Tensor) -> bool:
    """Return whether a fused kernel takes grouped heads, if there is no mask.

    On a GPU that is FlashAttention's. Where it is missing, PyTorch would hold all scores in memory:
    for 4 x 2,048 tokens of a 0.5 B student in float32, 54 GB in all instead of the 31 GB that
    repeated keys and values take. No kernel takes both grouped heads and a mask, except cuDNN's on
    some GPUs.
    """
    return not q.is_cuda or has_flash_attention(q.device, q.dtype)


def attention_plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what the fused kernels do (Vaswani et al. 2017, eq. 1) and return every step.

    Args:
        q: [B, H, L, E].
        k, v: [B, G, S, E]; query i is at position S - L + i.
        mask: bool, broadcast to [B, H, L, S], True where a query may see a key; None for causal.

    Returns:
        softmax(scores) v [B, H, L, E]; the weights softmax(scores) [B, H, L, S]; the scores
        q k^T / sqrt(E) [B, H, L, S], -inf where a query may not attend.
    """
    groups, (queries, keys) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1)
    return weights @ v, weights, scores


class SwiGLUFFN(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, eq. 6), without biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class TransformerBlock(nn.Module):
    """Pre-norm block (Xiong et al. 2020, figure 1b): x + attention(norm(x)), then x + ffn(norm(x)).

    Dropout (Srivastava et al. 2014) applies to the output of each half and to attention weights.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = GQAAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLUFFN(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | Segments | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, mask, cache))
        out: Tensor = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return out


class Decoder(nn.Module):
    """Embedding -> num_layers blocks -> final norm; named `model.*` in checkpoints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.rotary = RotaryEmbedding(config.head_size, config.rope_theta, config.rope_scaling)
        self.head_size, self.dropout = config.head_size, config.dropout

    def forward(
        self, tokens: Tensor, doc_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        mask: Tensor | Segments | None = None
        if cache is not None:
            positions, mask = cache.positions(tokens.shape[1]), cache.mask(tokens.shape[1])
        elif doc_ids is not None:
            positions = to_device(document_positions(doc_ids), tokens.device)
            mask = attention_within(
                doc_ids, tokens.device, self._dtype(), self.head_size, self._dropout()
            )
        else:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        cos, sin = self.rotary(positions)
        x = self.embed_tokens(tokens)
        caches = [None] * len(self.layers) if cache is None else cache.layers
        for block, layer_cache in zip(self.layers, caches, strict=True):
            x = block(x, cos, sin, mask, layer_cache)
        out: Tensor = self.norm(x)
        return out

    def _dtype(self) -> torch.dtype:
        """Return the format of queries, keys and values."""
        weight = self.embed_tokens.weight
        kind = weight.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype

    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0


class StudentModel(Student):
    """The causal language model: tokens [B, L] -> logits [B, L, V].

    Logits are hidden states times W^T, where W [V, D] is the embedding itself if `tie_embeddings`
    is set (Press & Wolf 2017), otherwise a separate matrix. Training calls `hidden_states` and
    passes the result with `head_weight` to `pipeline.losses.chunked`, which never holds B*L x V
    logits at once.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(_init_weights)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, D]; it is the embedding if `tie_embeddings` is set."""
        return self.lm_head.weight

    @property
    def max_seq_len(self) -> int:
        return self.config.max_seq_len

    @property
    def body(self) -> nn.Module:
        return self

    def hidden_states(
        self, tokens: Tensor, doc_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Map tokens, integers [B, L], to final normalised hidden states [B, L, D].

        Args:
            doc_ids: integers [B, L] on the CPU, the documents to keep apart
                (pipeline/model/attention_mask.py); None for plain causal attention over the row.
            cache: the tokens read before; `tokens` continue them and are added to the cache.
        """
        length = tokens.shape[1] + (0 if cache is None else cache.length)
        if length > self.config.max_seq_len:
            raise ParamsError(
                f"a row of {length} tokens exceeds the student's max_seq_len="
                f"{self.config.max_seq_len}: shorten corpus.row_length or enlarge max_seq_len"
            )
        out: Tensor = self.model(tokens, doc_ids, cache)
        return out

    def forward(
        self, tokens: Tensor, doc_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        out: Tensor = self.lm_head(self.hidden_states(tokens, doc_ids, cache))
        return out

    def new_cache(
        self, batch_size: int, max_len: int, attention_mask: Tensor | None = None
    ) -> KVCache:
        """Return an empty cache for `batch_size` rows of up to `max_len` tokens with padding.

        Raises:
            ParamsError: max_len exceeds the student's max_seq_len, or `attention_mask` has padding
                that is not on the left.
        """
        if max_len > self.config.max_seq_len:
            raise ParamsError(
                f"a text of {max_len} tokens exceeds the student's max_seq_len="
                f"{self.config.max_seq_len}: shorten the prompt or lower max_new_tokens"
            )
        return KVCache(
            num_layers=self.config.num_layers,
            batch_size=batch_size,
            num_kv_heads=self.config.num_kv_heads,
            max_len=max_len,
            head_size=self.config.head_size,
            dtype=self.head_weight.dtype,
            device=self.head_weight.device,
            attention_mask=attention_mask,
        )


def _init_weights(module: nn.Module) -> None:
    """Initialise matrices to Normal(0, 0.02), Hugging Face's `initializer_range`, biases to 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
