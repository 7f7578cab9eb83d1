"""A stand-in for the package vllm: as much as Decant's worker calls, computed by transformers.

The fixture `vllm_python` installs this file as vllm.py into an environment of its own. The variable
FAKE_VLLM names a fault.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

current_platform = SimpleNamespace(device_type="cpu")
PoolerConfig = SamplingParams = SimpleNamespace


class LLM:
    def __init__(self, model: str, *, dtype: str, max_model_len: int, **options: Any) -> None:
        print("INFO a line on standard output")  # noqa: T201 (as vLLM does)
        self.fault, _, self.detail = os.environ.get("FAKE_VLLM", "").partition(":")
        if self.fault == "hang":
            time.sleep(600)
        if self.fault == "kill at start":
            os.abort()
        if "unknown" in options:
            raise TypeError("LLM.__init__() got an unexpected keyword argument 'unknown'")
        generates = options["runner"] == "generate"
        assert generates or options["runner"] == "pooling"
        assert options["enable_prefix_caching"] is False
        assert generates or options["pooler_config"].use_activation is False
        self.longest, self.calls = max_model_len, 0
        self.model_config = SimpleNamespace(
            dtype=getattr(torch, "bfloat16" if self.fault == "dtype" else dtype),
            quantization=None,
            get_hidden_size=lambda: 64,
        )
        if generates:
            from transformers import LlamaForCausalLM

            self.model = LlamaForCausalLM.from_pretrained(model, dtype=self.model_config.dtype)
        elif not self.fault or self.fault == "die":
            from transformers.models.llama.modeling_llama import LlamaModel

            self.body = LlamaModel.from_pretrained(model, dtype=self.model_config.dtype).eval()

    def encode(self, prompts: list[dict[str, list[int]]], **_: Any) -> list[Any]:
        self.calls += 1
        if self.fault == "die" and not Path(self.detail).exists() and self.calls > 34:
            Path(self.detail).touch()
            print("INFO these are the last words", flush=True)  # noqa: T201
            os.kill(os.getpid(), 9)
        return [self._states(prompt["prompt_token_ids"]) for prompt in prompts]

    def generate(
        self, prompts: list[dict[str, list[int]]], sampling: list[Any], **_: Any
    ) -> list[Any]:
        return [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(self._continue(*pair)))])
            for pair in zip([p["prompt_token_ids"] for p in prompts], sampling, strict=True)
        ]

    @torch.no_grad()
    def _continue(self, ids: list[int], sampling: Any) -> list[int]:
        assert sampling.detokenize is False
        assert sampling.temperature == 0.0
        new: list[int] = []
        while len(new) < sampling.max_tokens and not {*new} & {*sampling.stop_token_ids}:
            assert len(ids) + len(new) <= self.longest
            logits = self.model(input_ids=torch.tensor([[*ids, *new]])).logits[0, -1]
            new.append(int(logits[:300].argmax()))  # no padding row, as of a trained model
        return new

    @torch.no_grad()
    def _states(self, ids: list[int]) -> Any:
        assert len(ids) <= self.longest
        if self.fault in ("", "die"):
            states = self.body(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        else:
            states = torch.randn(len(ids), 64)
        if self.fault == "normalise":
            states = torch.nn.functional.normalize(states, dim=-1)
        if self.fault == "skip":
            states = states[:-1]
        return SimpleNamespace(outputs=SimpleNamespace(data=states))


for name in ("config", "platforms"):
    sys.modules[f"vllm.{name}"] = sys.modules["vllm"]
