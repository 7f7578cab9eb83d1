"""The shape of a decoder, and the parameters and operations per token that follow from it.

Decoders are assumed to be like those of Qwen2, Llama, Qwen3, Mixtral or gpt-oss: grouped-query
attention, and a gated feed-forward, either dense or a mixture of experts. A mixture holds all of
its experts and computes with a few of them for each token, so memory counts all parameters and
operations only those that are used.

Symbols: D hidden, A query width (heads x head size), G key/value width, F intermediate (of one
expert, if there are any), V rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.train_params import LoraParams
from pipeline.planning.weight_format import WeightFormat


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of each layer's feed-forward, which a router [experts, D] chooses from."""

    number: int
    per_token: int  # experts that compute a token
    biased: bool = False  # router and experts have biases (gpt-oss)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a decoder."""

    hidden_size: int  # D
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int  # F
    vocab_size: int  # V, rows of the head
    tied: bool  # embedding and head are one matrix
    qkv_bias: bool
    o_bias: bool = False
    qk_norm: bool = False  # norms over the head size, of queries and of keys
    sinks: bool = False  # one more logit per head, and no fused attention in transformers
    experts: Experts | None = None
    model_type: str = ""  # of config.json; empty for our own decoder
    weight_format: WeightFormat | None = None  # None: not quantised

    @property
    def query_size(self) -> int:
        """A, the width of all query heads."""
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """G, the width of all key/value heads."""
        return self.num_kv_heads * self.head_size

    @property
    def active_experts(self) -> int:
        """Feed-forwards of a layer that compute a token: 1 in a dense decoder."""
        return self.experts.per_token if self.experts else 1

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Return inputs and outputs of the linear layers of a block, by Hugging Face's names.

        Experts are stacked into one tensor and are not among them.
        """
        d, a, g, f = self.hidden_size, self.query_size, self.kv_size, self.intermediate_size
        attention = {"q_proj": (d, a), "k_proj": (d, g), "v_proj": (d, g), "o_proj": (a, d)}
        if self.experts:
            return attention
        return attention | {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}

    @property
    def linear_matrices(self) -> int:
        """Weights of all blocks' linear layers without experts and routers."""
        return self.num_layers * sum(one * two for one, two in self.matrices().values())

    @property
    def expert_matrices(self) -> int:
        """Weights of all experts of all blocks; 0 in a dense decoder."""
        number = self.experts.number if self.experts else 0
        return self.num_layers * number * 3 * self.hidden_size * self.intermediate_size

    @property
    def routers(self) -> int:
        """Weights of all blocks' routers."""
        return self.num_layers * self.hidden_size * (self.experts.number if self.experts else 0)

    @property
    def body_matrices(self) -> int:
        """Weights of all blocks' matrices, those of unused experts included."""
        return self.linear_matrices + self.expert_matrices + self.routers

    @property
    def active_matrices(self) -> int:
        """Weights of all blocks' matrices that are used for a token, each once."""
        if self.experts is None:
            return self.body_matrices
        used = self.expert_matrices * self.experts.per_token // self.experts.number
        return self.linear_matrices + used + self.routers

    @property
    def head(self) -> int:
        """Weights of the head, V x D."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """Number of all parameters; a tied matrix counts once."""
        embeddings = self.head if self.tied else 2 * self.head
        vectors = self.num_layers * self._vectors_of_a_block() + self.hidden_size
        return self.body_matrices + vectors + embeddings

    @property
    def active_parameters(self) -> int:
        """Weights that compute a token, the head's included; the embedding is only looked up."""
        return self.active_matrices + self.head

    def _vectors_of_a_block(self) -> int:
        """Return the number of biases, norms and sinks of a block."""
        vectors = 2 * self.hidden_size
        if self.qkv_bias:
            vectors += self.query_size + 2 * self.kv_size
        if self.o_bias:
            vectors += self.hidden_size
        if self.qk_norm:
            vectors += 2 * self.head_size
        if self.sinks:
            vectors += self.num_heads
        if self.experts and self.experts.biased:
            an_expert = 2 * self.intermediate_size + self.hidden_size
            vectors += self.experts.number * (an_expert + 1)
        return vectors

    def lora_parameters(self, lora: LoraParams) -> int:
        """Return the number of adapter weights on the named layers: r (inputs + outputs) each."""
        sizes = [sum(size) for name, size in self.matrices().items() if name in lora.targets]
        return self.num_layers * lora.rank * sum(sizes)

    def weight_bytes(self, size: int) -> float:
        """Return the bytes of all weights.

        Args:
            size: bytes of each weight that is not quantised.
        """
        if self.weight_format is None:
            return float(size * self.parameters)
        quantised = self.expert_matrices
        if not self.weight_format.experts_only:
            quantised += self.linear_matrices
        return quantised * self.weight_format.bits / 8 + size * (self.parameters - quantised)

    def body_operations(self, row_length: int) -> float:
        """Return the operations per token of a forward through the blocks: 2 N + 4 A L per layer.

        Each weight in use takes one multiplication and one addition. Attention computes L products
        with keys and L with values, even if a mask drops some (Chowdhery et al. 2022, PaLM,
        appendix B).
        """
        return 2.0 * self.active_matrices + 4.0 * self.num_layers * self.query_size * row_length

    def forward_operations(self, row_length: int) -> float:
        """Return the operations per token of a forward through blocks and head."""
        return self.body_operations(row_length) + 2.0 * self.head
