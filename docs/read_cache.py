"""Read a logit cache with NumPy and zarr alone, as pipeline/logit_cache/format.py specifies it.

python docs/read_cache.py cache/logits.zarr/train 0
"""

import sys

import numpy as np
import zarr


def slots(flat, counts, *, by_rank=False):
    """Put a chunk's ragged values into [positions, most]; 0 where a position has fewer."""
    is_filled = np.arange(counts.max()) < counts[:, None]
    values = np.zeros(is_filled.shape, flat.dtype)
    if by_rank:
        values.T[is_filled.T] = flat[: is_filled.sum()]
    else:
        values[is_filled] = flat[: is_filled.sum()]
    return values


def read_chunk(group, chunk):
    """Return the targets of chunk_rows rows from the row chunk * chunk_rows on, by name."""
    about = group.attrs["decant"]
    rows = slice(chunk * about["chunk_rows"], (chunk + 1) * about["chunk_rows"])
    id_order = group[about["id_order"]][:]
    entropies = group["entropies"][rows].reshape(-1, 1 + len(about["temperatures"])) / 4096
    found = {}
    if not about["imported_from"]:  # an imported cache knows no sums over the full row
        found |= {"entropy": entropies[:, 0], "lse": group["lse"][rows].ravel()}
    for tau, renyi in zip(about["temperatures"], entropies[:, 1:].T, strict=True):
        found[f"lse_at_{tau:g}"] = renyi * (1 - 1 / tau)  # log sum exp(logprob / tau)
    if about["k"]:
        counts = group["num_kept"][rows].ravel()
        found["ids"] = id_order[slots(group["id_indices"][chunk], counts)]
        deltas = slots(group["logprob_deltas"][chunk], counts, by_rank=True)
        logprobs = np.cumsum(deltas, axis=1, dtype=np.uint16).view(np.float16)
        is_kept = np.arange(counts.max()) < counts[:, None]
        found["logprobs"] = np.where(is_kept, logprobs, -np.inf)
    if about["num_sampled"]:
        counts = group["num_distinct"][rows].ravel()
        deltas = slots(group["sampled_index_deltas"][chunk], counts)
        found["sampled_ids"] = id_order[np.cumsum(deltas, axis=1, dtype=deltas.dtype)]
        found["sampled_counts"] = slots(group["sampled_counts"][chunk], counts)
    return found


if __name__ == "__main__":
    targets = read_chunk(zarr.open_group(sys.argv[1], mode="r"), int(sys.argv[2]))
    sys.stdout.writelines(f"{name} {v.dtype} {v.shape} {v[0]}\n" for name, v in targets.items())
