"""A teacher of twice the memory limit of a process, captured by processes that share it.

    python tests/benchmarks/sharded_memory.py [--limit 2048] [--processes 4] [--way fsdp]

Makes a random Llama whose float32 weights are twice the limit, and captures two rows of it: with
one process, which must fail, and with as many as asked for, started by torchrun. A process that
holds more than the limit (MiB of private resident memory; pages of mapped files are not counted,
since the system can drop them) is killed, as a cgroup would. Printed are the exit statuses, and the
most that one process held. Needs the limit's size on the disk.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models import make_sentences, make_tokenizer

ROOT = Path(__file__).parents[2]
MIB = 2**20
ROW_LENGTH = 64


def make_teacher(folder: Path, size: int, hidden: int) -> int:
    """Save a random Llama of about `size` bytes in float32, in bfloat16; return its parameters."""
    a_layer = 4 * hidden * hidden * 2 + 4 * 3 * hidden * 4 * hidden  # q, o and a half each of k, v
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=max(2, round(size / a_layer)),
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=ROW_LENGTH,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="200MB")
    make_tokenizer(folder)
    return int(model.num_parameters())


def make_params(folder: Path, teacher: Path, way: str) -> Path:
    """Write text and parameters that send two rows of each split through the teacher."""
    lines = (json.dumps({"text": text}) for text in make_sentences(60, seed=0))
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    values = {
        "device": "cpu",
        "paths": {
            "teacher": str(teacher),
            "corpus": str(folder / "corpus.zarr"),
            "logits": str(folder / "logits.zarr"),
        },
        "corpus": {
            "source": "files",
            "files": {"paths": [str(folder / "text.jsonl")], "column": "text"},
            "train_tokens": 2 * ROW_LENGTH,
            "validation_tokens": 2 * ROW_LENGTH,
            "row_length": ROW_LENGTH,
        },
        "prepare": {"dtype": "float32", "k": 16, "parallel": way},
        "capture": {"batch_rows": 2, "head_chunk": 64},
    }
    file = folder / "params.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def run_limited(command: list[str], limit: int) -> tuple[int, float, str]:
    """Run a command whose processes may hold `limit` bytes each.

    Returns:
        Exit status, the most that one of its processes held (MiB), and what they printed.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    most = 0.0

    def watch() -> None:
        nonlocal most
        while process.poll() is None:
            for pid, held in processes_of(process.pid):
                most = max(most, held)
                if held > limit:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed, _ = process.communicate()
    watcher.join()
    return process.returncode, most / MIB, printed


def processes_of(root: int) -> Iterator[tuple[int, int]]:
    """Yield number and private resident memory (bytes) of a process and its descendants (Linux)."""
    held: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):
            values = dict(line.split(":", 1) for line in file.read_text().splitlines())
            pid, anonymous = int(values["Pid"]), values.get("RssAnon", "0 kB")  # not of a zombie
            held[pid] = int(anonymous.split()[0]) * 1024
            children.setdefault(int(values["PPid"]), []).append(pid)
    todo = [root]
    while todo:
        pid = todo.pop()
        todo += children.get(pid, [])
        if pid in held:
            yield pid, held[pid]


@click.command()
@click.option("--limit", default=2048, show_default=True, help="MiB that a process may hold.")
@click.option("--size", help="MiB of the teacher.  [default: twice the limit]", type=int)
@click.option("--processes", default=4, show_default=True, help="Processes that share the teacher.")
@click.option("--hidden", default=2048, show_default=True, help="Hidden size of the teacher.")
@click.option("--way", "ways", multiple=True, type=click.Choice(["tensor", "fsdp"]))
def main(limit: int, size: int | None, processes: int, hidden: int, ways: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        number = make_teacher(folder / "teacher", (size or 2 * limit) * MIB, hidden)
        print(f"teacher: {number / 1e6:,.0f} M parameters, {4 * number / MIB:,.0f} MiB in float32")
        file = make_params(folder, folder / "teacher", "auto")
        words = ["--params", str(file)]
        subprocess.run(
            [sys.executable, "stages/corpus.py", *words],
            check=True,
            capture_output=True,
            cwd=ROOT,
        )
        status, peak, _ = run_limited([sys.executable, "stages/prepare.py", *words], limit * MIB)
        print(f"one process under {limit:,} MiB: exit status {status}, at most {peak:,.0f} MiB")
        for way in ways or ("tensor", "fsdp"):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            torchrun += ["--nproc-per-node", str(processes), "stages/prepare.py", *words]
            torchrun += ["--set", f"prepare.parallel={way}", "--overwrite"]
            status, peak, printed = run_limited(torchrun, limit * MIB)
            print(
                f"{processes} processes under {limit:,} MiB each, {way}: exit status {status}, "
                f"at most {peak:,.0f} MiB"
            )
            if status:
                print(printed[-3000:])


if __name__ == "__main__":
    main()
