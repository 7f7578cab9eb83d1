"""An encoder for DistillKit's compressed log-probabilities, in plain NumPy.

Written from the description in pipeline/interchange/distillkit_codec.py, one position at a time, so
that it shares nothing with the decoder. Beside the bytes it returns what they say, computed in
float64 from the numbers that were stored.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml


def pack(numbers: list[int], bits: int) -> list[int]:
    """Numbers one after another, most significant bit first, filled up to whole bytes."""
    text = "".join(format(number, f"0{bits}b") for number in numbers)
    text += "0" * (-len(text) % 8)
    return [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


def pack_in_words(numbers: list[int], bits: int) -> list[int]:
    """As many as fit whole in each 64-bit integer, the first in the lowest bits."""
    each = 64 // bits
    words = []
    for start in range(0, len(numbers), each):
        some = numbers[start : start + each]
        words.append(sum(number << (bits * place) for place, number in enumerate(some)))
    return words


def as_bytes(values: Any, dtype: str) -> tuple[list[int], np.ndarray]:
    """Floats in a format: their bytes, and what they are now."""
    values = np.asarray(values, np.float64)
    if dtype == "bfloat16":  # the upper half of a float32, rounded to even
        words = values.astype("<f4").view(np.uint32).astype(np.uint64)
        upper = ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype("<u2")
        back = (upper.astype(np.uint32) << 16).view(np.float32)
        return list(upper.tobytes()), back.astype(np.float64)
    stored = values.astype({"float16": "<f2", "float32": "<f4", "float64": "<f8"}[dtype])
    return list(stored.tobytes()), stored.astype(np.float64)


def encode(logprobs: np.ndarray, about: dict[str, Any]) -> tuple[list[int], np.ndarray]:
    """The bytes of one position's K values, which descend, and what they mean."""
    exact_k, k = about["exact_k"], about["k"]
    delta = about["delta_encoding"]
    values = np.diff(logprobs, prepend=0.0) if delta else np.asarray(logprobs, np.float64)
    data, exact = as_bytes(values[:exact_k], about["exact_dtype"])
    rest, means = values[exact_k:], np.zeros(k - exact_k)
    if about["polynomial_terms"]:
        count = k - exact_k
        t = np.linspace(0, 1, count) if about["normalize_t"] else np.arange(count)
        named = {"sqrt": np.sqrt, "exp": np.exp}
        columns = [
            named[n](t) if n in named else np.power(t, float(n)) for n in about["polynomial_terms"]
        ]
        terms = np.stack(columns, -1)
        more, weights = as_bytes(np.linalg.lstsq(terms, rest)[0], about["term_dtype"])
        data += more
        means = terms @ weights
    residual, place = rest - means, 0
    for one in about["residual_bins"]:
        bits, count = one["element_bits"], one["num_elements"]
        part = residual[place : place + count]
        largest = float(np.abs(part).max()) or 1.0
        smallest = 0 if bits == 1 else -(2 ** (bits - 1))
        more, scale = as_bytes([largest / max(1, 2 ** (bits - 1) - 1)], one["scale_dtype"])
        if bits == 1:
            numbers = (part > 0).astype(int).tolist()
            said = [scale[0] if number else -scale[0] for number in numbers]
        else:
            steps = np.clip(np.round(part / scale[0]), smallest, -smallest - 1)
            numbers = (steps - smallest).astype(int).tolist()
            said = [(number + smallest) * scale[0] for number in numbers]
        data += more + pack(numbers, bits)
        means[place : place + count] += said
        place += count
    found = np.concatenate((exact, means))
    return data, np.cumsum(found) if delta else found


def encode_legacy(
    logprobs: np.ndarray, about: dict[str, Any]
) -> tuple[list[float], list[float], np.ndarray]:
    """Exact values and coefficients of one position, and what they mean."""
    exact_k, count = about["exact_k"], about["k"] - about["exact_k"]
    exact = logprobs[:exact_k].astype(np.float16).astype(np.float64)
    if not count:
        return exact.tolist(), [], exact
    t = np.arange(1, count + 1, dtype=np.float64)
    sign = -1 if about["invert_polynomial"] else 1
    columns = [t ** (sign * power) for power in range(about["polynomial_degree"] + 1)]
    terms = np.stack([*columns, *([np.sqrt(t)] if about["with_sqrt_term"] else [])], -1)
    weights = np.linalg.lstsq(terms, logprobs[exact_k:])[0].astype(np.float32).astype(np.float64)
    return exact.tolist(), weights.tolist(), np.concatenate((exact, terms @ weights))


COMPRESSION: dict[str, Any] = {
    "d": 300,
    "k": 16,
    "exact_k": 16,
    "exact_dtype": "float32",
    "polynomial_terms": None,
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "error_diffusion": False,
    "normalize_t": False,
}
LEGACY: dict[str, Any] = {
    "vocab_size": 300,
    "k": 16,
    "exact_k": 16,
    "polynomial_degree": 0,
    "invert_polynomial": True,
    "with_sqrt_term": False,
    "term_dtype": "float32",
}


def bits_of(number: int) -> int:
    return math.ceil(math.log2(number))


def columns_of(
    ids: np.ndarray, logprobs: np.ndarray, about: dict[str, Any] | None
) -> tuple[dict[str, Any], np.ndarray]:
    """The columns of a sequence's targets [n, K], and what they say, float64 [n, K]."""
    if about is None:
        return {"token_ids": ids.tolist(), "top_values": logprobs.tolist()}, logprobs
    if "vocab_size" in about:
        bits = bits_of(about["vocab_size"])
        encoded = [encode_legacy(values, about) for values in logprobs]
        columns = {
            "packed_indices": [pack_in_words(row, bits) for row in ids.tolist()],
            "exact_values": [exact for exact, _, _ in encoded],
            "coeffs": [weights for _, weights, _ in encoded],
        }
        return columns, np.stack([said for _, _, said in encoded])
    written = [encode(values, about) for values in logprobs]
    columns = {
        "compressed_logprobs": [data for data, _ in written],
        "bytepacked_indices": [pack(row, bits_of(about["d"])) for row in ids.tolist()],
    }
    return columns, np.stack([said for _, said in written])


TYPES = {
    "input_ids": pa.list_(pa.uint64()),
    "attention_mask": pa.list_(pa.int64()),
    "labels": pa.list_(pa.int64()),
    "token_ids": pa.list_(pa.list_(pa.int64())),
    "top_values": pa.list_(pa.list_(pa.float32())),
    "packed_indices": pa.list_(pa.list_(pa.uint64())),
    "exact_values": pa.list_(pa.list_(pa.float32())),
    "coeffs": pa.list_(pa.list_(pa.float32())),
    "compressed_logprobs": pa.list_(pa.list_(pa.uint8())),
    "bytepacked_indices": pa.list_(pa.list_(pa.uint8())),
}
"""The types of DistillKit's own schemas, and those of `datasets` for the columns it adds."""


def write_capture(
    folder: Path, rows: list[dict[str, Any]], about: dict[str, Any] | None, *, files: int = 2
) -> Path:
    """Parquet files of these rows, and the configuration beside them."""
    folder.mkdir(parents=True)
    schema = pa.schema([(name, TYPES[name]) for name in rows[0]])
    for number in range(files):
        table = pa.Table.from_pylist(rows[number::files], schema)
        pq.write_table(table, folder / f"data_{number}.parquet")
    if about is not None:
        (folder / "compression_config.yaml").write_text(yaml.safe_dump(about))
    return folder
