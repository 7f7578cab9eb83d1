"""Peak rates and memory of devices, for plans. A peak is a limit; plans assume a share of it.

Rates are dense (without sparsity), in operations per second, where a multiplication and an addition
are two operations. Half precision accumulates products in float32; float32 is without TF32, which
is PyTorch's default. From NVIDIA's own papers:

    t4          T4 Tensor Core GPU datasheet (2019); Turing has no bfloat16 units
    l4          L4 Tensor Core GPU datasheet (2023), half of the rate given with sparsity
    rtx3090     Ampere GA102 GPU architecture whitepaper (2021), appendix A
    rtx4090     Ada GPU architecture whitepaper (2023), appendix A
    a100-*      A100 Tensor Core GPU datasheet (2021), SXM
    h100, h200  H100 and H200 Tensor Core GPU datasheets (2023, 2024), SXM, half of the rates given
                with sparsity

Compute capabilities are those of NVIDIA's CUDA GPUs page.

cpu is two cores of a server processor with AMX (Intel, 2.7 GHz), at the rate that `torch.mm` of
4096 x 4096 reached per second of processor time; it multiplies float16 in float32. cpu-avx2 is two
cores of a server processor (AMD EPYC) without units for half formats, at the rate that `torch.mm`
of 2048 x 2048 reached; there, `auto` is float32. Their 16 GB of memory are an assumption.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.cache_params import DeviceName


@dataclass(frozen=True, kw_only=True)
class Device:
    """Peak rates and memory of one device."""

    half: float  # operations per second in float16, and in bfloat16 if there are units for it
    single: float  # operations per second in float32
    memory: float  # bytes
    has_bfloat16: bool = True
    capability: tuple[int, int] = (0, 0)  # CUDA compute capability; nothing of a CPU
    has_float16: bool = True  # a CPU computes products of float16 factors in float32

    @property
    def is_gpu(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return self.capability > (0, 0)

    @property
    def gpu_memory(self) -> float | None:
        """Bytes of a GPU's memory; None for a CPU."""
        return self.memory if self.is_gpu else None

    def peak(self, dtype: str) -> float:
        """Return the operations per second in "float32", "bfloat16" or "float16"."""
        has_units = {"bfloat16": self.has_bfloat16, "float16": self.has_float16, "float32": False}
        return self.half if has_units[dtype] else self.single


DEVICES: dict[DeviceName, Device] = {
    "cpu": Device(half=1.86e12, single=0.36e12, memory=16e9, has_float16=False),
    "cpu-avx2": Device(
        half=0.082e12, single=0.082e12, memory=16e9, has_bfloat16=False, has_float16=False
    ),
    "t4": Device(half=65e12, single=8.1e12, memory=16e9, capability=(7, 5), has_bfloat16=False),
    "l4": Device(half=121e12, single=30.3e12, memory=24e9, capability=(8, 9)),
    "rtx3090": Device(half=71e12, single=35.6e12, memory=24e9, capability=(8, 6)),
    "rtx4090": Device(half=165.2e12, single=82.6e12, memory=24e9, capability=(8, 9)),
    "a100-40gb": Device(half=312e12, single=19.5e12, memory=40e9, capability=(8, 0)),
    "a100-80gb": Device(half=312e12, single=19.5e12, memory=80e9, capability=(8, 0)),
    "h100": Device(half=989e12, single=67e12, memory=80e9, capability=(9, 0)),
    "h200": Device(half=989e12, single=67e12, memory=141e9, capability=(9, 0)),
}
