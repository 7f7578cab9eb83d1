"""Run Triton kernels apart from the tests' process, and compile them without a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.targets.block_search import BLOCK

ROOT = Path(__file__).parents[1]
ARCHITECTURES = {75: "T4", 80: "A100", 89: "RTX 4090", 90: "H100", 100: "B200"}
FIXED = ("block", "blocks", "group", "step", "columns", "column_of_one")  # not worth printing
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which is for Linux alone"
)
FLOATS, INTS, LONGS = "*fp32", "*i32", "*i64"


def run_apart(module: str, code: str, **variables: str) -> str:
    """In a process of its own, since Triton looks at the environment when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", f"from {module} import *; {code}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": "", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def interpret_fast() -> None:
    """Let the interpreter prepare each function once, and not for a millisecond at every call."""
    from triton.runtime import interpreter

    prepared: set[Any] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


@dataclass(frozen=True)
class Variant:
    """A kernel with the types and constants of one of its launches."""

    module: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int


def variants() -> Iterator[Variant]:
    """Every kernel of the project, with constants of every branch."""
    module = "pipeline.runtime.triton_probe"
    yield Variant(module, "_add_one", {"count": INTS}, {}, 4)
    module = "pipeline.losses.kernels_triton"
    numbers = {"stride": "i64", "vocab_size": "i32", "inverse_tau": "fp32"}
    tensors = {
        "_softmax_stats": ("logits", "peak", "at_tau", "at_one"),
        "_softmax_grad_": ("logits", "peak", "of_tau", "of_one"),
    }
    for kernel, names in tensors.items():
        for two in (False, True):
            types = dict.fromkeys(names, FLOATS) | numbers
            yield Variant(module, kernel, types, {"two": two, "block": 4096}, 8)
    module = "pipeline.targets.reduce_triton"
    from pipeline.targets import reduce_triton

    numbers = {"stride": "i64", "vocab_size": "i32"}
    constants = {"block": BLOCK, "blocks": reduce_triton._BLOCKS_PER_TILE, "group": 8}
    names = ("logits", "peaks", "sums", "weighted", "maxima", "group_maxima", "block_sums")
    types = dict.fromkeys(names, FLOATS) | numbers | {"num_programs": "i32"}
    for taus, sampling in (((1.0,), False), ((2.0, 1.0), True), ((4.0, 3.0, 1.0, 0.5), False)):
        of_launch = {"taus": taus, "sampling": sampling}
        yield Variant(module, "_reduce_tiles", types, constants | of_launch, 4)
    names = (*names[:-1], "peak", "log_total", "lse", "lse_tau", "entropy", "logprobs")
    types = dict.fromkeys(names, FLOATS) | {"ids": LONGS, "scratch": INTS} | numbers
    types |= dict.fromkeys(("tiles", "num_tiles", "k"), "i32")
    for k, vocabulary in ((0, 151_665), (64, 151_665), (256, 262_144), (16, 32_000)):
        tiles = -(-vocabulary // (constants["block"] * constants["blocks"]))
        shape = reduce_triton._search_shape(k, tiles)
        ids_padded, groups_padded, num_warps = shape
        of_launch = {
            "temperatures": (1.0, 2.0),
            "columns": (1, 0),
            "column_of_one": 1,
            "tiles_padded": 128,
            "groups_padded": groups_padded,
            "ids_padded": ids_padded,
        }
        yield Variant(module, "_combine", types, constants | of_launch, num_warps)
    types = {"logits": FLOATS, "lse": FLOATS, "kept": LONGS, "blocks": LONGS, "weights": FLOATS}
    types |= numbers | {"chosen": "i32", "num_kept": "i32"}
    yield Variant(module, "_write_weights_outside", types, {"block": BLOCK, "step": 32}, 1)


def launched() -> set[tuple[str, str]]:
    """Module and name of every kernel that the project starts."""
    found = set()
    for file in (ROOT / "pipeline").rglob("*.py"):
        text = file.read_text()
        if "import triton\n" in text:
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            found |= {(module, name) for name in re.findall(r"\b(_\w+)\[\(", text)}
    return found


def compile_all(*architectures: int, large: bool = True) -> Iterator[str]:
    """Compile each variant, and say its registers and bytes of stack, into which they would spill.

    Args:
        large: compile the search for many ids, too, which takes ten seconds per architecture.

    Raises:
        AssertionError: registers spill, or the project starts a kernel that has no variant here.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = list(variants())
    assert {(variant.module, variant.kernel) for variant in found} == launched()
    for variant in found:
        if not large and variant.constants.get("ids_padded", 0) > 16:
            continue
        kernel = getattr(importlib.import_module(variant.module), variant.kernel)
        constants = variant.constants
        source = ASTSource(kernel, variant.types | dict.fromkeys(constants, "constexpr"), constants)
        for architecture in architectures:
            target = GPUTarget("cuda", architecture, 32)
            compiled = triton.compile(source, target, {"num_warps": variant.num_warps})
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(compiled.asm["cubin"])
                file.flush()
                usage = subprocess.check_output(
                    [cuobjdump, "--dump-resource-usage", file.name], text=True
                )
            values = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage))
            assert values["STACK"] == values["LOCAL"] == "0", (
                f"{variant}, sm_{architecture}: {usage}"
            )
            shape = {name: value for name, value in constants.items() if name not in FIXED}
            yield (
                f"sm_{architecture} {variant.kernel}: {values['REG']} registers, no spills, "
                f"{variant.num_warps} warps, {shape}\n"
            )
