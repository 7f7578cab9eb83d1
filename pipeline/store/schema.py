"""The logit cache on disk: its specification, in enough detail for a reader in another language.

A cache is a Zarr v3 group per split (`logits.zarr/train`, `logits.zarr/validation`), in a folder or
under a prefix of an object store. N rows of L tokens in corpus order; K ids kept exactly; M ids
drawn from the rest; J temperatures; V valid vocabulary ids. Ids >= V (rows of the head no tokenizer
id points to) are left out of every sum.

    rank_to_id       [V]        uint32   the token id at each rank (below)
    id_ranks         [N, L, K]  uintX    ranks of the K most probable ids, by falling logit
    logprob_steps    [N, L, K]  uint16   their float16 log-probabilities at temperature 1, as steps
    lse              [N, L]     float32  logsumexp of the position's V logits: logit = logprob + lse
    lse_tau          [N, L, J]  float32  log sum_v exp(logprob_v / tau_j) over all V ids
    entropy          [N, L]     float16  entropy at temperature 1, nats
    draw_rank_steps  [N, L, M]  uintX    ranks of M draws, rising, as steps
    draw_logprobs    [N, L, M]  float16  log-probabilities of the drawn ids at temperature 1

uintX is uint16 if V <= 65,536, else uint32. Arrays with K = 0 or M = 0 are left out. Positions of
padding tokens are stored like others.

Ranks. The ids that appear among the top K are few and far from evenly spread, but a tokenizer
numbers them in an order of its own. Numbered by how often they appear, they compress to 95 bytes a
token instead of 109 (K = 64, SmolLM2). rank_to_id is counted once, on the first rows that the
teacher sees, and is a permutation of 0..V-1: id = rank_to_id[rank].

Steps. Let b_k be the k-th value (for log-probabilities: the float16's bits read as uint16). Then
stored[0] = b_0 and stored[k] = b_k - b_(k-1), modulo 2^16 (or 2^32); decode by a running sum with
the same modulus. Falling negative float16 have rising bits, so the steps are small; the transform
is exact for any bits. logprob_steps lies in storage with its last axis first (the transpose codec):
steps of the same rank resemble each other.

Draws. M ids drawn with replacement from the teacher's distribution at temperature 1, conditioned on
not being among the K. With p_t the mass outside the K ids, putting p_t / M on each draw makes a
target whose expectation is the teacher's full distribution (Anshumann et al. 2025, "Sparse Logit
Sampling"). With K = 0 the draws come from the whole distribution. The draws of corpus row r are a
function of (seed, r) and the probabilities alone, so any writer draws the same.

Shards. Every array with N rows is cut into shards of shard_rows rows, one object each,
`<array>/c/<shard>/0/0`, and chunks of chunk_rows rows within; pipeline/sharding.py describes their
bytes. Any Zarr v3 reader opens them. Each chunk ends with its crc32c, and so does the shard's
index. rank_to_id is one chunk.

Group attributes: {"decant": {...Fingerprint, "chunk_rows", "shard_rows", "rank_table"},
"arrays": {array: crc32c of its zarr.json}, "crc32c"}. rank_table is the name of the array
rank_to_id, `rank_to_id_` and the crc32c of its little-endian bytes in hexadecimal. "crc32c" is that
of the JSON text of the other attributes, keys sorted, with "," and ":" as separators.

Commit markers: `commits/<shard, six digits>.json` in the group,
    {"shard": i, "rows": [first, end), "cache": crc32c, "tokens_sha256": hex,
     "objects": {array: [bytes, xxh3]}, "crc32c": of the JSON text of the rest, as above}
where cache is the crc32c of the JSON text of the group's attribute "decant", tokens_sha256 is
`pipeline.data.rows.hash_rows` of the corpus rows, and objects says how long each array's shard is
and the 128-bit xxh3, in hexadecimal, of its key followed by its bytes: a shard that lies in the
place of another is found, too. A shard WITHOUT a marker does not exist, whatever its files hold:
zarr reads a missing shard as zeros. One writer owns a whole shard; it writes all arrays' objects
durably (on a disk: write, fsync, rename, fsync of the folder), then the marker likewise.

A reader refuses a format_version other than its own. The version rises too when the same inputs
would give other numbers (pipeline/topk.py), since a cache is continued whatever program began it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

from pydantic import Field

from pipeline.errors import MismatchError, shortened
from pipeline.model.attention import Attention
from pipeline.sharding import Crc, Entry, Length, Number, Sha256, Size, parse

Temperature = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
FORMAT_VERSION = 1
COMMITS = "commits"
RANK_TABLE = "rank_to_id_"
"""How the name of a rank table begins; the crc32c of its bytes follows."""


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What a cache was made from; a reader or writer that meets another one refuses."""

    format_version: int
    teacher_sha256: str
    tokenizer_sha256: str
    corpus_sha256: str  # of the split
    dtype: str  # the teacher's number format
    attention: Attention  # of the teacher over a row (pipeline/model/attention.py)
    k: Number
    draws: Number  # M
    draw_seed: Number  # 0 without draws
    temperatures: tuple[Temperature, ...]
    vocab_size: Length  # V
    num_rows: Size  # N
    row_length: Length  # L

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Fingerprint:
        """Parse what a group says of itself; raises KeyError where a field is missing.

        Raises:
            DamagedError: a value is of another type.
        """
        known = {field.name: values[field.name] for field in fields(cls)}
        return parse(cls, known, "its zarr.json")

    def require_equal(self, other: Fingerprint, where: str, remedy: str) -> None:
        """Refuse another fingerprint, naming the first field that differs.

        Args:
            other: what is wanted now; `self` is what the cache at `where` holds.
        """
        if difference := self.difference(other):
            raise MismatchError(f"{where} {difference}: {remedy}")

    def difference(self, wanted: Fingerprint) -> str:
        """The first field that differs, in words; empty where none does."""
        mine, theirs = asdict(self), asdict(wanted)
        for name, value in mine.items():
            if value != theirs[name]:
                was, now = _brief(value), _brief(theirs[name])
                return f"was made with {name}={was}, wanted is {now}"
        return ""


def _brief(value: object) -> str:
    return value if isinstance(value, str) and len(value) <= 80 else shortened(value)


@dataclass(frozen=True, kw_only=True)
class Marker:
    """A shard's commit marker, as above."""

    shard: Number
    rows: tuple[Number, Number]
    cache: Crc
    tokens_sha256: Sha256
    objects: dict[str, Entry]
    crc32c: Crc = 0  # of the rest; `seal` writes it


def marker_key(shard: int) -> str:
    """Where the commit marker of a shard lies."""
    return f"{COMMITS}/{shard:06d}.json"
