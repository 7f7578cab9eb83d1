"""The logit cache on disk: its specification, in enough detail for a reader in another language.

A cache is a Zarr v3 group per split (`logits.zarr/train`, `logits.zarr/validation`). N rows of L
tokens in corpus order; K kept ids; J temperatures; V valid vocabulary ids.

    ids       [N, L, K]  uint16 if V <= 65,536 else uint32   token ids, by falling logit
    logprobs  [N, L, K]  uint16   float16 log-probabilities at temperature 1, as steps (below)
    lse       [N, L]     float32  logsumexp of the row's V logits: logit = logprob + lse
    lse_tau   [N, L, J]  float32  log sum_v exp(logprob_v / tau_j) over all V ids
    entropy   [N, L]     float16  entropy of the row at temperature 1, nats

Rows of padding tokens are stored like others. Ids >= V (rows of the head no tokenizer id points
to) are left out of every sum.

Steps: let b_k be the bits of the k-th log-probability as float16, read as uint16. Then stored[0] =
b_0 and stored[k] = b_k - b_(k-1) modulo 2^16; decode by a running sum modulo 2^16. Falling negative
float16 have rising bits, so the steps are small and compress well; the transform is exact for any
bits.

Chunks span (chunk_rows, L, K) and lie in shards of (shard_rows, L, K): one file a shard and array,
`<array>/c/<shard>/0/0`. Each chunk is little-endian bytes, then blosc (zstd level 1, byte shuffle,
blocks of 262,144 bytes), then crc32c; the shard index carries a crc32c too. All arrays of a group
share chunk_rows and shard_rows.

Group attributes: {"decant": {...Fingerprint, "chunk_rows", "shard_rows"}}.

Commit markers: `commits/<shard, six digits>.json` in the group,
    {"shard": i, "rows": [first, end), "tokens_sha256": hex, "sizes": {array: bytes of its shard}}
where tokens_sha256 is `pipeline.data.rows.hash_rows` of the corpus rows. A shard WITHOUT a marker
does not exist, whatever its files hold: zarr reads a missing shard as zeros. One writer owns a
whole shard; it writes and fsyncs all arrays' files, then the marker (write, fsync, rename, fsync
of the folder).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from zarr.codecs import BloscCodec, Crc32cCodec

from pipeline.errors import MismatchError

FORMAT_VERSION = 1
ARRAYS = ("ids", "logprobs", "lse", "lse_tau", "entropy")
COMMITS = "commits"


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What a cache was made from; a reader or writer that meets another one refuses."""

    format_version: int
    teacher_sha256: str
    tokenizer_sha256: str
    corpus_sha256: str  # of the split
    dtype: str  # the teacher's number format
    attention: str  # "packed": plain causal attention over the whole row
    k: int
    temperatures: tuple[float, ...]
    vocab_size: int  # V
    num_rows: int  # N
    row_length: int  # L

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> Fingerprint:
        """Parse stored attributes.

        Raises:
            MismatchError: a newer or incomplete format.
        """
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise MismatchError(
                f"{where} has cache format {version}, this program reads {FORMAT_VERSION}: use the "
                "version of Decant that wrote it, or capture again"
            )
        names = {field.name for field in fields(cls)}
        if missing := names - values.keys():
            raise MismatchError(f"{where} lacks {', '.join(sorted(missing))}: it is damaged")
        known = {name: values[name] for name in names}
        return cls(**{**known, "temperatures": tuple(float(t) for t in values["temperatures"])})

    def require_equal(self, other: Fingerprint, where: str, remedy: str) -> None:
        """Refuse another fingerprint, naming the first field that differs.

        Args:
            other: what is wanted now; `self` is what the cache at `where` holds.
        """
        mine, theirs = asdict(self), asdict(other)
        for name, value in mine.items():
            if value != theirs[name]:
                raise MismatchError(
                    f"{where} was made with {name}={value}, wanted is {theirs[name]}: {remedy}"
                )


def num_shards(num_rows: int, shard_rows: int) -> int:
    """How many shards hold num_rows rows; the last may be short."""
    return -(-num_rows // shard_rows)


def array_layout(
    fingerprint: Fingerprint, chunk_rows: int, shard_rows: int
) -> dict[str, dict[str, Any]]:
    """Keyword arguments of `Group.create_array` for each array of the format."""
    n, length = fingerprint.num_rows, fingerprint.row_length
    k, j = fingerprint.k, len(fingerprint.temperatures)
    id_dtype = "uint16" if fingerprint.vocab_size <= 65_536 else "uint32"
    shapes = {
        "ids": ((n, length, k), id_dtype),
        "logprobs": ((n, length, k), "uint16"),
        "lse": ((n, length), "float32"),
        "lse_tau": ((n, length, j), "float32"),
        "entropy": ((n, length), "float16"),
    }
    blosc = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", blocksize=262_144)
    return {
        name: {
            "shape": shape,
            "dtype": dtype,
            "chunks": (chunk_rows, *shape[1:]),
            "shards": (shard_rows, *shape[1:]),
            "compressors": [blosc, Crc32cCodec()],
            "dimension_names": ("row", "position", "rank")[: len(shape)],
        }
        for name, (shape, dtype) in shapes.items()
    }
