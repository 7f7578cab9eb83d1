"""Run llama.cpp's server until standard input ends: `python -P llama_server.py FILE ...`.

This is a separate program, started by `LlamaCpp` in llama_cpp.py, because llama.cpp ends the
process on damaged files, takes over Ctrl-C, and prints wherever it likes. It imports nothing from
Decant.
"""

from __future__ import annotations

import os
import sys


def main(file: str, context: int, threads: int) -> None:
    """Load a GGUF file, print the server's address as a line on standard output, and wait."""
    import xllamacpp as llama

    params = llama.CommonParams()
    params.model.path = file
    params.n_ctx = context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers = 0
    # For the most exact arithmetic, keys and values are float32, and attention is not fused.
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.fit_params = params.warmup = params.ui = False
    params.cache_ram_mib = 0
    params.verbosity = 1  # only errors, on standard error
    server = llama.Server(params)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)  # there is nothing to save, and this avoids a second of cleanup


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
