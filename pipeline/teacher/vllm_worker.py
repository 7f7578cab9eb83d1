"""Run vLLM as a server of hidden states or of continuations: `python -I vllm_worker.py DESCRIPTOR`.

This is a separate program, started by pipeline/teacher/vllm_process.py with the interpreter of
vLLM's own environment. It imports nothing from Decant. It talks over a socket, whose descriptor it
is given, because vLLM prints wherever it likes. Each message is a JSON object followed by raw
bytes:

    to the worker     {"arguments": of vllm.LLM}, once
    from the worker   {"dtype", "hidden_size", ...}, once the model is loaded
    to the worker     {"lengths": of the sequences}, their ids as int32
    from the worker   {"lengths": as computed}, the states [sum of lengths, D] in the dtype
    to the worker     {"lengths", "sampling": of vllm.SamplingParams, each}, ids: to continue them
    from the worker   {"lengths": of the new tokens of each sequence}, their ids as int32
    from the worker   {"error": a sentence} instead, after which it ends

All sequences of a message are given to vLLM in one call, and its scheduler runs in this process, so
that the same message is always computed in the same batches. The worker ends when the socket is
closed at the other end, that is, with the process that started it, whatever ended that.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_HEAD = struct.Struct("<IQ")  # bytes of the JSON text and of what follows it
_GRACE = 10.0  # seconds in which the worker should end by itself

Idle = Callable[[], object]
"""Called whenever the socket's timeout has passed; it may raise an error."""


def send(
    stream: socket.socket, message: dict[str, Any], data: Any = b"", idle: Idle = bool
) -> None:
    """Send a message and the bytes of a buffer."""
    text = json.dumps(message).encode()
    raw = memoryview(data).cast("B")
    for part in (memoryview(_HEAD.pack(len(text), len(raw)) + text), raw):
        while part:
            try:
                part = part[stream.send(part) :]
            except TimeoutError:
                idle()


def receive(stream: socket.socket, idle: Idle = bool) -> tuple[dict[str, Any], bytearray]:
    """Receive a message and its bytes.

    Raises:
        EOFError: the other end is closed.
    """
    text_size, data_size = _HEAD.unpack(_read(stream, _HEAD.size, idle))
    return json.loads(_read(stream, text_size, idle)), _read(stream, data_size, idle)


def _read(stream: socket.socket, size: int, idle: Idle) -> bytearray:
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        try:
            number = stream.recv_into(rest)
        except TimeoutError:
            idle()
            continue
        if not number:
            raise EOFError
        rest = rest[number:]
    return data


def main(descriptor: int) -> None:
    """Load the model, then answer until the other end is closed."""
    stream = socket.socket(fileno=descriptor)
    stream.set_inheritable(False)
    threading.Thread(target=_end_with_parent, args=(descriptor,), daemon=True).start()
    try:
        answer(stream)
    except (EOFError, ConnectionError):
        return
    except Exception as error:
        traceback.print_exc()
        reason = " ".join(str(error).split())[:300]
        send(stream, {"error": f"{type(error).__name__}: {reason}"})
        sys.exit(1)


def answer(stream: socket.socket) -> None:
    """Start vLLM as the first message says, and compute what later ones ask for."""
    import vllm
    from vllm.config import PoolerConfig
    from vllm.platforms import current_platform

    arguments = receive(stream)[0]["arguments"]
    if "pooler_config" in arguments:
        arguments["pooler_config"] = PoolerConfig(**arguments["pooler_config"])
    engine = vllm.LLM(**arguments)
    model = engine.model_config
    about = {
        "torch": torch.__version__,
        "device": current_platform.device_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization,
        "hidden_size": model.get_hidden_size(),
    }
    send(stream, about)
    while True:
        asked, data = receive(stream)
        ids = np.split(np.frombuffer(data, np.int32), np.cumsum(asked["lengths"])[:-1])
        prompts = [{"prompt_token_ids": part.tolist()} for part in ids]
        if "sampling" in asked:
            sampling = [vllm.SamplingParams(**options) for options in asked["sampling"]]
            outputs = engine.generate(prompts, sampling, use_tqdm=False)
            new = [output.outputs[0].token_ids for output in outputs]
            flat = [token for ids in new for token in ids]
            send(stream, {"lengths": list(map(len, new))}, np.array(flat, np.int32))
            continue
        outputs = engine.encode(prompts, pooling_task="token_embed", use_tqdm=False)
        states = [output.outputs.data for output in outputs]
        whole = torch.cat(states).to(device="cpu", dtype=model.dtype).contiguous()
        send(stream, {"lengths": list(map(len, states))}, whole.view(torch.uint8).numpy())


def _end_with_parent(descriptor: int) -> None:
    """Wait for the other end to be closed, then end the group of this process and of vLLM's own."""
    waiter = select.poll()
    waiter.register(descriptor, 0)  # a hang-up is always reported
    waiter.poll()
    time.sleep(_GRACE)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
