"""A teacher whose body vLLM runs, in a process of its own; the head is ours.

vLLM serves embedding models that return a vector for each token. Run as one of these, without
pooling and without normalisation, a causal language model returns its final hidden states. Each
document of a row is one request, so documents do not see each other whatever the architecture is.

The states of all positions come to this process, over the PCIe bus if they were computed on a GPU.
Reducing them inside vLLM's worker would avoid that, but there is no public way to the worker's
model: it takes private attributes, and a serialisation of functions that vLLM calls insecure.

Before it is used, a teacher is tested: a few positions must be finite, of the head's size and not
of length 1, and for a small model they must be those of transformers.

Shapes: B batch, L length, D hidden.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.cache_params import VllmParams
from pipeline.errors import DecantError
from pipeline.model.attention_mask import document_positions
from pipeline.model.head import load_head
from pipeline.model.huggingface import max_positions
from pipeline.model.logit_transform import LogitTransform
from pipeline.model.quantization import Quantization, describe_weights, read_quantization
from pipeline.runtime.batch_sizes import COMPARED_ON_CPU
from pipeline.runtime.device import dtype_name
from pipeline.teacher.teacher import Teacher
from pipeline.teacher.transformers import HuggingFaceTeacher
from pipeline.teacher.vllm_process import VllmProcess, vllm_version

_ROUNDING_ONLY = frozenset(
    {
        "block_size",
        "cpu_offload_gb",
        "disable_custom_all_reduce",
        "disable_log_stats",
        "distributed_executor_backend",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "pipeline_parallel_size",
        "safetensors_load_strategy",
        "swap_space",
        "use_tqdm_on_load",
    }
)
"""Options that say where and in which portions vLLM computes the same; others are recorded."""

_PROBE_TOKENS = 16
_PROBED_BYTES = 2**30  # of safetensors; transformers loads a larger model only for the probe
_FLOAT32, _HALF = 1e-3, 0.1  # relative to the states' norm: allowed in the probe
_UNIT = 1e-2  # how far lengths are from 1 if states are normalised and rounded


def describe_vllm(params: VllmParams, quantization: Quantization | None) -> str:
    """Name vLLM's version, the weights, and the options that change the teacher's numbers.

    Raises:
        DecantError: see `vllm_version`.
    """
    weights = describe_weights(quantization, dequantize=False)
    said = [f"vllm {vllm_version(params.python)}{weights}"]
    for name, value in sorted(params.options.items()):
        if name not in _ROUNDING_ONLY and (name, value) != ("tensor_parallel_size", 1):
            shown = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            said.append(f"{name}={shown}")
    return ", ".join(said)


class VllmTeacher(Teacher):
    """A model folder, run by vLLM.

    Args:
        folder: Hugging Face folder with safetensors; no code from it is run.
        params: interpreter and options of vLLM.
        row_length: number of tokens in the longest row.
        batch_tokens: number of tokens in the largest batch.
        vocab_size, dtype, device, head_chunk: see `Teacher`.

    Raises:
        DecantError: the folder is not a model, vLLM cannot load it, or its states are not those of
            the model.
    """

    def __init__(
        self,
        folder: Path,
        params: VllmParams,
        *,
        row_length: int,
        batch_tokens: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
        head_chunk: int = COMPARED_ON_CPU,
    ) -> None:
        head = load_head(folder, dtype)
        quantization = read_quantization(folder)
        longest = max_positions(head.config)
        arguments: dict[str, Any] = {
            "enforce_eager": True,
            "gpu_memory_utilization": 0.8,  # the rest is for the head and its logits
            "max_num_batched_tokens": max(batch_tokens, row_length),
            "disable_log_stats": True,
            **params.options,
            "model": str(folder.absolute()),
            "runner": "pooling",
            "convert": "embed",
            "pooler_config": {
                "task": "token_embed",
                "pooling_type": "ALL",
                "use_activation": False,  # otherwise states are scaled to length 1
            },
            "hf_overrides": {"head_dtype": "model"},
            "dtype": dtype_name(dtype),
            "max_model_len": min(row_length, longest or row_length),
            "enable_prefix_caching": False,  # positions read from a cache have no states
        }
        self._stored = describe_weights(quantization, dequantize=False)
        threads = torch.get_num_threads() if device.type == "cpu" else None
        self._engine = VllmProcess(params.python, arguments, threads=threads)
        self._model_type, self._num_parameters = head.config.model_type, head.num_parameters
        try:
            # Only now, since vLLM demands its share of a GPU's memory when it starts.
            super().__init__(
                folder,
                head=head.weight,
                bias=head.bias,
                transform=LogitTransform.of_config(head.config),
                vocab_size=vocab_size,
                dtype=dtype,
                device=device,
                max_seq_len=longest,
                head_chunk=head_chunk,
            )
            self._require_own_states(len(head.weight[0]), params, quantization)
        except BaseException:
            self.close()
            raise

    @property
    def num_parameters(self) -> int:
        return self._num_parameters

    def describe(self) -> str:
        where = f"{self._engine.about['device']} by vLLM {self._engine.version}"
        return self._described(self._model_type, where, self._stored)

    def states(self, tokens: Tensor, doc_ids: Tensor | None) -> Tensor:
        if doc_ids is None:
            starts = torch.arange(tokens.shape[1]).eq(0).expand_as(tokens)
        else:
            starts = document_positions(doc_ids) == 0
        first = starts.flatten().nonzero().flatten()
        lengths = torch.diff(first, append=torch.tensor([tokens.numel()])).tolist()
        states = self._engine.states(tokens.flatten().int().cpu().numpy(), lengths)
        return states.view(*tokens.shape, -1).to(self.device, self._compute_dtype)

    def close(self) -> None:
        """End vLLM. This happens too when the teacher is deleted, and when this process ends."""
        self._engine.close()

    def _require_own_states(
        self, size: int, params: VllmParams, quantization: Quantization | None
    ) -> None:
        """Refuse an engine that returns anything but the final hidden states.

        Args:
            size: D of the head.
        """
        engine = f"vLLM {self._engine.version}"
        if (found := self._engine.about["hidden_size"]) != size:
            raise DecantError(
                f"{engine} returns states of {found} numbers for the model of {self.folder}, whose "
                f"head takes {size}: choose prepare.engine=transformers"
            )
        if (dtype := self._engine.about["dtype"]) != dtype_name(self.dtype):
            raise DecantError(
                f"{engine} computes {self.folder} in {dtype} though {dtype_name(self.dtype)} was "
                f"asked: set prepare.dtype to {dtype}"
            )
        if quantization is not None and not self._engine.about["quantization"]:
            raise DecantError(
                f"{engine} dequantised {self.folder} ({quantization.name}) when it loaded it: "
                "choose another version of vLLM, or the unquantised model"
            )
        number = min(_PROBE_TOKENS, self.max_seq_len or _PROBE_TOKENS)
        tokens = torch.linspace(0, self.vocab_size - 1, number).long()[None]
        states = self.states(tokens, None).float()
        if not bool(states.isfinite().all()):
            raise DecantError(
                f"the states that {engine} computes overflow in {dtype_name(self.dtype)}: set "
                "prepare.dtype, or in evaluate evaluate.dtype, to bfloat16 or float32"
            )
        if bool((states.norm(dim=-1) - 1.0).abs().max() < _UNIT):
            raise DecantError(
                f"{engine} scales the states of {self.folder} to length 1, so its logits are "
                "unknown: choose prepare.engine=transformers"
            )
        quantised = quantization is not None or "quantization" in params.options
        weights = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        if quantised or weights > _PROBED_BYTES:  # other numbers; too large to load twice
            return
        reference = HuggingFaceTeacher(
            self.folder, vocab_size=self.vocab_size, dtype=self.dtype, device=self.device
        )
        wanted = reference.states(tokens, None).float()
        error = float((states - wanted).norm() / wanted.norm())
        allowed = _FLOAT32 if self.dtype == torch.float32 else _HALF
        if not error <= allowed:
            raise DecantError(
                f"the states that {engine} computes for {self.folder} differ from transformers' by "
                f"{error:.2g} of their norm, more than {allowed:g}: choose "
                "prepare.engine=transformers"
            )
