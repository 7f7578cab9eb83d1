"""Runs llama.cpp's server until its standard input ends: `python -P llama_server.py FILE ...`.

A program of its own, started by `LlamaCpp` in llama_cpp.py, since llama.cpp ends the process on
damaged files, takes over Ctrl-C, and prints where it likes. Nothing of Decant is imported here.
"""

from __future__ import annotations

import os
import sys


def main(file: str, context: int, threads: int) -> None:
    """Load a GGUF file, say by a line on standard output where it listens, and wait."""
    import xllamacpp as llama

    params = llama.CommonParams()
    params.model.path = file
    params.n_ctx = context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers = 0
    # As exact as it gets: keys and values are kept in float32, attention is not fused.
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.fit_params = params.warmup = params.ui = False
    params.cache_ram_mib = 0
    params.verbosity = 1  # errors, on standard error
    server = llama.Server(params)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)  # nothing is to be saved, and a second of tidying up to be had


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
