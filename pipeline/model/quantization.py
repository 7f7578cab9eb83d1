"""Quantised checkpoints of transformers: which it is, and whether it runs quantised on a device.

A checkpoint says in config.json (`quantization_config`) how its weights are stored. Where kernels,
a package or a suitable GPU are missing, transformers loads several kinds in bfloat16 instead,
after a line in its log, and compressed-tensors expands its weights on the first forward pass. Both
compute other numbers in more memory, so such a checkpoint is refused here unless `dequantize`
asks for it. What the library itself checks, it is asked for; only what it would do later, or on
another device than Decant's, is written down here.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import DecantError, ParamsError, reason_of
from pipeline.model.config_json import load_config, quantization_config, read_config_json
from pipeline.runtime.device import dtype_name
from pipeline.runtime.optional import import_transformers

_PARTS = ("scale", "zero", "absmax", "quant", "packed", "SCB")
"""Words in the names of tensors that belong to a quantised weight."""
_OF_KV_CACHE = ("k_scale", "v_scale", "output_scale")  # which Decant does not use
_WEIGHTS = ("weight", "weight_packed", "qweight")


class QuantizedError(DecantError):
    """The weights are quantised, and what was asked for needs them unquantised."""


@dataclass(frozen=True)
class _Method:
    packages: tuple[str, ...]  # names of modules, keys of _PIP_NAMES
    capability: tuple[int, int] | None = None  # of the CUDA GPU that the kernels need
    dequantizes: bool = False  # transformers can convert the weights when it loads them


_FP8 = _Method(("accelerate", "kernels"), capability=(8, 9), dequantizes=True)
_METHODS = {
    "fp8": _FP8,
    "mxfp8": _FP8,
    "mxfp4": _Method(("accelerate", "kernels", "triton"), capability=(7, 5), dequantizes=True),
    "compressed-tensors": _Method(
        ("accelerate", "compressed_tensors"), capability=(8, 9), dequantizes=True
    ),
    "bitsandbytes": _Method(("accelerate", "bitsandbytes")),
    "torchao": _Method(("accelerate", "torchao")),
    "awq": _Method(("accelerate", "gptqmodel")),
    "gptq": _Method(("accelerate", "gptqmodel", "optimum")),
}
_PIP_NAMES = {
    "accelerate": "accelerate",
    "bitsandbytes": "bitsandbytes",
    "compressed_tensors": "compressed-tensors",
    "gptqmodel": "gptqmodel",
    "kernels": "'transformers[kernels]'",  # of the version that this transformers takes
    "optimum": "optimum",
    "torchao": "torchao",
    "triton": "triton",
}


@dataclass(frozen=True)
class Quantization:
    """How a folder's weights are stored: the method, and a name for it that a user knows."""

    folder: Path
    method: str
    name: str
    config: Mapping[str, Any]  # quantization_config of config.json

    def load_options(
        self, dtype: torch.dtype, device: torch.device | None, *, what: str, dequantize: bool
    ) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` with which the weights load as asked.

        Args:
            device: where the model runs; None refuses it, for a role that needs plain weights.
            what: the model's role, for the message.
            dequantize: convert the weights to `dtype` instead of computing with them as they are.

        Raises:
            QuantizedError: the weights cannot be used as stored; the message says what is missing.
            ParamsError: `dtype`, or `dequantize`, is not possible with this method.
        """
        if device is None:
            raise QuantizedError(
                f"{self.folder} is quantised ({self.name}), and a {what} needs plain weights: "
                "name the unquantised model"
            )
        self._require_known()
        if dequantize:
            self._require_dequantizable()
        elif device.type == "cpu" and dtype == torch.float16:
            raise ParamsError(
                f"float16 on a CPU rounds the weights, and those of {self.folder} are quantised "
                f"({self.name}): set the dtype to auto, bfloat16 or float32"
            )
        remedy = _remedy(what, _METHODS[self.method].dequantizes and not dequantize)
        self._require_packages(remedy, dequantize=dequantize)
        changes: dict[str, Any] = {"dequantize": True} if dequantize else {}
        if not dequantize:
            self._require_gpu(device, remedy)
            if self.method == "compressed-tensors":
                self._require_fp8_scheme(remedy)
                changes["use_optimized_inference"] = True
        self._require_environment(device, remedy, dequantize=dequantize)
        for name in ("bitsandbytes", "torchao"):  # a line for each layer and call, or for each .so
            logging.getLogger(name).setLevel(logging.ERROR)
        return {"config": self._changed_config(changes), "device_map": {"": device}}

    def require_loaded_so(
        self, model: Any, unexpected: set[str], dtype: torch.dtype, *, what: str, dequantize: bool
    ) -> None:
        """Check a loaded model: it has all its scales, is quantised or not as asked, and runs.

        Args:
            unexpected: names of the tensors that the model took nothing from.
            what: the model's role, for the message.

        Raises:
            DecantError: tensors that belong to quantised weights are left out, the model is
                dequantised or in another dtype, or its kernels fail.
        """
        if lost := sorted(name for name in unexpected if _is_lost(name, unexpected)):
            raise DecantError(
                f"transformers leaves out {len(lost)} tensors of {self.folder}, for example "
                f"{lost[0]}, without which its weights ({self.name}) mean something else: use the "
                "model's original files, or the unquantised model"
            )
        if getattr(model, "is_quantized", False) == dequantize:
            did = "did not dequantise" if dequantize else "dequantised"
            raise QuantizedError(
                f"transformers {did} {self.folder} ({self.name}) when it loaded it: "
                f"{_remedy(what, dequantize=False)}"
            )
        found = model.get_input_embeddings().weight.dtype
        if not dequantize and found != dtype:
            shown = [dtype_name(d) for d in (found, dtype)]
            raise ParamsError(
                f"{self.folder} ({self.name}) computes in {shown[0]} whatever is asked, and "
                f"{shown[1]} was asked: set the dtype to {shown[0]}"
            )
        if not dequantize:
            self._require_kernels(model, what)

    @torch.no_grad()
    def _require_kernels(self, model: Any, what: str) -> None:
        """Run two tokens: some kernels are fetched, or refuse the GPU, on the first pass."""
        try:
            model(input_ids=torch.tensor([[0, 1]], device=model.device), use_cache=False)
        except Exception as error:  # of any library with kernels
            raise QuantizedError(
                f"{self.folder} is quantised ({self.name}), and its kernels do not run here "
                f"({reason_of(error)}): provide what they need, "
                f"{_remedy(what, _METHODS[self.method].dequantizes)}"
            ) from error

    def _require_known(self) -> None:
        if self.method not in _METHODS:
            raise QuantizedError(
                f"{self.folder} is quantised by {self.method!r}, which Decant does not open: use "
                f"one quantised by {', '.join(_METHODS)}, or the unquantised model"
            )

    def _require_dequantizable(self) -> None:
        if not _METHODS[self.method].dequantizes:
            able = ", ".join(name for name, method in _METHODS.items() if method.dequantizes)
            raise ParamsError(
                f"prepare.dequantize=true, and transformers dequantises {able} when it loads them, "
                f"not {self.name}, as {self.folder} is: set it to false"
            )

    def _require_packages(self, remedy: str, *, dequantize: bool) -> None:
        method = _METHODS[self.method]
        needed = [p for p in method.packages if not (dequantize and p in ("kernels", "triton"))]
        missing = [name for name in needed if not _is_installed(name)]
        if missing:
            raise QuantizedError(
                f"{self.folder} is quantised ({self.name}), for which transformers needs "
                f"{' and '.join(missing)}: install by `pip install "
                f"{' '.join(_PIP_NAMES[name] for name in missing)}`, {remedy}"
            )

    def _require_gpu(self, device: torch.device, remedy: str) -> None:
        wanted = _METHODS[self.method].capability
        if wanted is None:
            return
        here = "cpu"
        if device.type == "cuda":
            found = torch.cuda.get_device_capability(device)
            if found >= wanted:
                return
            here = f"{torch.cuda.get_device_name(device)}, {found[0]}.{found[1]}"
        raise QuantizedError(
            f"{self.folder} is quantised ({self.name}), and transformers would dequantise it on "
            f"this device ({here}), since the kernels need a CUDA GPU of compute capability "
            f"{wanted[0]}.{wanted[1]}: use such a GPU, {remedy}"
        )

    def _require_fp8_scheme(self, remedy: str) -> None:
        """Refuse what transformers has no kernels for: all but FP8 weights times FP8 activations.

        Other schemes are expanded on the first forward pass.
        """
        groups = self.config.get("config_groups")
        schemes = list(groups.values()) if isinstance(groups, dict) else []
        parts = [
            scheme.get(part) if isinstance(scheme, dict) else None
            for scheme in schemes
            for part in ("weights", "input_activations")
        ]
        if not parts or not all(map(_is_row_wise_fp8, parts)):
            raise QuantizedError(
                f"{self.folder} is quantised ({self.name}), and transformers runs only FP8 weights "
                "with FP8 activations of compressed-tensors without dequantising them, each with "
                f"scales per channel, token or tensor: {remedy}"
            )

    def _require_environment(self, device: torch.device, remedy: str, *, dequantize: bool) -> None:
        """Ask transformers, which knows the versions of packages that it needs."""
        import_transformers()
        from transformers.quantizers.auto import AutoHfQuantizer

        said = {**self.config, "dequantize": True} if dequantize else dict(self.config)
        try:
            quantizer = AutoHfQuantizer.from_config(said, pre_quantized=True)
            quantizer.validate_environment(device_map={"": device})
        except Exception as error:  # of the library's checks and of foreign values
            raise QuantizedError(
                f"{self.folder} is quantised ({self.name}), and transformers cannot run that here "
                f"({reason_of(error)}): provide that, {remedy}"
            ) from error
        if getattr(quantizer.quantization_config, "dequantize", False) and not dequantize:
            raise QuantizedError(
                f"{self.folder} is quantised ({self.name}), and transformers would dequantise it "
                f"in this environment: {remedy}"
            )

    def _changed_config(self, changes: Mapping[str, Any]) -> Any:
        """Return the model's config, with changes of how the weights are loaded."""
        config = load_config(self.folder)
        if changes:
            config.quantization_config = {**self.config, **changes}
        return config


def _is_lost(name: str, unexpected: set[str]) -> bool:
    """Return whether a tensor that was left out belongs to a weight that was not."""
    module, _, tensor = name.rpartition(".")
    if tensor in _OF_KV_CACHE or not any(part in tensor for part in _PARTS):
        return False
    return not any(f"{module}.{weight}" in unexpected for weight in _WEIGHTS)


def _is_installed(name: str) -> bool:
    if name == "kernels":
        return bool(import_transformers().utils.is_kernels_available())
    return importlib.util.find_spec(name) is not None


def _is_row_wise_fp8(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and part.get("type") == "float"
        and part.get("num_bits") == 8
        and part.get("strategy") in ("channel", "token", "tensor")
    )


def _remedy(what: str, dequantize: bool) -> str:
    if what != "teacher":
        return "or use the unquantised model"
    remedies = ["set prepare.engine=vllm and verify.engine=vllm, ", "or use the unquantised model"]
    if dequantize:
        remedies.insert(
            1, "set prepare.dequantize=true, which takes an unquantised model's memory, "
        )
    return "".join(remedies)


def read_quantization(folder: Path) -> Quantization | None:
    """Return how a model folder is quantised; None if it is not, or holds no config.json.

    Raises:
        DecantError: config.json is damaged.
    """
    if not (folder / "config.json").exists():
        return None
    found = quantization_config(read_config_json(folder))
    if found is None:
        return None
    method, config = found
    detail: Any = None
    if method == "bitsandbytes":
        is_int8 = config.get("load_in_8bit") and not config.get("load_in_4bit")
        detail = "int8" if is_int8 else config.get("bnb_4bit_quant_type", "fp4")
    elif method == "torchao":
        detail = config.get("quant_type")
        while isinstance(detail, dict):
            detail = detail.get("default") or detail.get("_type")
    elif method == "compressed-tensors":
        detail = config.get("format")
    elif isinstance(config.get("bits"), int):
        detail = f"int{config['bits']}"
    name = f"{method} {detail}" if isinstance(detail, str) else method
    return Quantization(folder, method, name.removesuffix("Config"), config)


def describe_weights(quantization: Quantization | None, *, dequantize: bool) -> str:
    """Return words to put after a model's name, for example ", fp8"; empty if not quantised."""
    if quantization is None:
        return ""
    return f", {quantization.name}" + (" dequantized" if dequantize else "")


def refuse_quantized(folder: Path, what: str) -> None:
    """Refuse a folder with quantised weights for a role that needs plain ones.

    Raises:
        QuantizedError: its weights are quantised.
    """
    if (quantization := read_quantization(folder)) is not None:
        quantization.load_options(torch.float32, None, what=what, dequantize=False)


def require_plain_head_weight(folder: Path, model: Any) -> None:
    """Refuse a model whose head is itself quantised: it must be a matrix to multiply by.

    Raises:
        QuantizedError: it is quantised.
    """
    head = model.get_output_embeddings()
    weight: Any = getattr(head, "weight", None)
    plain = type(weight) in (nn.Parameter, torch.Tensor)
    if head is not None and not (plain and weight.dtype.is_floating_point and weight.itemsize > 1):
        raise QuantizedError(
            f"the head of {folder} is quantised too ({type(head).__name__}), and Decant multiplies "
            "by it itself: choose a checkpoint that leaves lm_head unquantised, as most do, or the "
            "unquantised model"
        )
