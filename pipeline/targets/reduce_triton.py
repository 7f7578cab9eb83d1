"""Reduce rows of logits to TopK by Triton kernels, which read the logits once.

This is the twin of `pipeline.targets.reduce_torch` for a GPU (tests/targets/test_reduce_kernels.py:
under Triton's interpreter, and on a GPU), which reads or writes them 16 times. A row has too many
ids for one program, and a chunk too few rows to keep a GPU busy with one program per row.
Therefore each row is divided into tiles, and each tile has a program of its own.

1. `_reduce_tiles` reads a tile and writes its maximum, its sums, and the maxima of its blocks.
2. `_combine` has one program per row. It adds the sums of the row's tiles, each scaled to the row's
   maximum, and finds the k largest logits by a search in groups of 8: the k largest logits are in
   the k groups with the largest maxima. The search starts at groups of 8 blocks and goes on to the
   members of the k groups found: blocks, groups of 8 logits, logits.
3. Ids are sampled from the sums of the blocks, which the first kernel writes then. Only the blocks
   with kept ids are read again, to leave these ids out.

This module is imported only if Triton is usable: see `pipeline.targets.reduce`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.targets import block_search
from pipeline.targets.block_search import BLOCK
from pipeline.targets.selection import count_distinct, cut_to_mass
from pipeline.targets.topk import TopK

_BLOCKS_PER_TILE = 32  # a power of two; 2,048 logits are 16 registers in each of 128 threads
_GROUP = 8  # members of a group in the search; divides BLOCK and _BLOCKS_PER_TILE
_MOST_IDS = 256  # the search keeps 8 candidates per id in registers
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # float32's lowest
_LOWEST_KEY = tl.constexpr(-(2**31))  # below the key of every value


def reduce_rows(
    logits: Tensor,
    k: int,
    temperatures: tuple[float, ...],
    uniforms: Tensor | None,
    top_p: float | None = None,
) -> TopK:
    """Compute `reduce.top_k_from_logits`."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    n, vocab_size = logits.shape
    sampling = uniforms is not None and uniforms.shape[-1] > 0
    taus = tuple(sorted({1.0, *temperatures}, reverse=True))
    tiles = triton.cdiv(vocab_size, _BLOCKS_PER_TILE * BLOCK)
    # `maxima` and `block_sums` hold whole tiles, which are padded beyond the end of the row.
    peaks, weighted = logits.new_empty(2, n, tiles)
    sums = logits.new_empty(len(taus), n, tiles)
    maxima = logits.new_empty(n, tiles * _BLOCKS_PER_TILE)
    group_maxima = logits.new_empty(n, tiles * _BLOCKS_PER_TILE // _GROUP)
    block_sums = torch.empty_like(maxima) if sampling else maxima
    searched = 0 < k <= _MOST_IDS
    peak, log_total, lse, entropy = logits.new_empty(4, n, 1)
    lse_tau = logits.new_empty(n, len(temperatures))
    logprobs = logits.new_empty(n, k if searched else 0)
    ids = torch.empty(logprobs.shape, dtype=torch.int64, device=logits.device)
    scratch = torch.empty(n, 4, logprobs.shape[1], dtype=torch.int32, device=logits.device)
    with torch.cuda.device(logits.get_device()):
        _reduce_tiles[(n * tiles,)](
            logits,
            peaks,
            sums,
            weighted,
            maxima,
            group_maxima,
            block_sums,
            logits.stride(0),
            vocab_size,
            n * tiles,
            taus=taus,
            sampling=sampling,
            block=BLOCK,
            blocks=_BLOCKS_PER_TILE,
            group=_GROUP,
            num_warps=4,
        )
        ids_padded, groups_padded, num_warps = _search_shape(k if searched else 0, tiles)
        _combine[(n,)](
            logits,
            peaks,
            sums,
            weighted,
            maxima,
            group_maxima,
            peak,
            log_total,
            lse,
            lse_tau,
            entropy,
            logprobs,
            ids,
            scratch,
            logits.stride(0),
            vocab_size,
            tiles,
            n * tiles,
            k,
            temperatures=temperatures,
            columns=tuple(taus.index(tau) for tau in temperatures),
            column_of_one=taus.index(1.0),
            tiles_padded=triton.next_power_of_2(tiles),
            groups_padded=groups_padded,
            ids_padded=ids_padded,
            block=BLOCK,
            blocks=_BLOCKS_PER_TILE,
            group=_GROUP,
            num_warps=num_warps,
        )
    if not searched:
        values, ids = block_search.block_top_k(logits, k, maxima)
        logprobs = values - peak - log_total
    ids, logprobs = cut_to_mass(ids, logprobs, top_p)
    sampled_ids = ids.new_empty(n, 0)
    if sampling:
        assert uniforms is not None
        sampled_ids = _sample(logits, lse, ids, uniforms, peaks, block_sums)
    sampled_ids, sampled_counts = count_distinct(sampled_ids)
    needed = sampled_ids if temperatures else sampled_ids[:, :0]
    return TopK(
        has_target=torch.ones(n, dtype=torch.bool, device=logits.device),
        ids=ids,
        logprobs=logprobs,
        lse=lse[:, 0],
        lse_tau=lse_tau,
        entropy=entropy[:, 0],
        sampled_ids=sampled_ids,
        sampled_counts=sampled_counts,
        sampled_logprobs=logits.gather(-1, needed) - peak - log_total,
        num_sampled=0 if uniforms is None else uniforms.shape[-1],
        temperatures=temperatures,
        vocab_size=vocab_size,
    )


def _search_shape(k: int, tiles: int) -> tuple[int, int, int]:
    """Return the padded numbers of ids and of first groups, and the warps of a search's program."""
    if not k:
        return 0, 0, 1
    ids = max(8, triton.next_power_of_2(k))
    groups = max(ids, triton.next_power_of_2(tiles * _BLOCKS_PER_TILE // _GROUP))
    # One warp adds without waiting for others; it holds 512 keys in 16 registers per thread.
    return ids, groups, max(1, max(groups, ids * _GROUP) // 512)


def _sample(
    logits: Tensor, lse: Tensor, kept: Tensor, uniforms: Tensor, peaks: Tensor, block_sums: Tensor
) -> Tensor:
    """Draw ids as `reduce_torch` does.

    Args:
        peaks: [n, tiles], the maxima of the tiles.
        block_sums: [n, tiles * _BLOCKS_PER_TILE], the sum of each block, relative to the maximum of
            its tile; overwritten.
    """
    size = logits.shape[-1]
    scales = torch.exp(peaks - lse)
    block_sums.view(*peaks.shape, _BLOCKS_PER_TILE).mul_(scales[..., None])
    if kept.shape[-1]:
        changed = kept // BLOCK
        block_sums.scatter_(-1, changed, _weights_outside(logits, lse, kept, changed).sum(-1))

    def weights_of(blocks: Tensor) -> Tensor:
        return _weights_outside(logits, lse, kept, blocks)

    valid = triton.cdiv(size, BLOCK)
    return block_search.invert_block_sums(block_sums[:, :valid], uniforms, weights_of, size)


def _weights_outside(logits: Tensor, lse: Tensor, kept: Tensor, blocks: Tensor) -> Tensor:
    """Return exp(logit - lse) of the chosen blocks, [n, J] -> [n, J, BLOCK], 0 at the kept ids."""
    n, chosen = blocks.shape
    weights = logits.new_empty(n, chosen, BLOCK)
    with torch.cuda.device(logits.get_device()):
        _write_weights_outside[(n * chosen,)](
            logits,
            lse,
            kept,
            blocks,
            weights,
            logits.stride(0),
            logits.shape[-1],
            chosen,
            kept.shape[-1],
            block=BLOCK,
            step=32,
            num_warps=1,
        )
    return weights


# Triton compiles the source including annotations, so constexpr is the only annotation allowed.
@triton.jit  # type: ignore[untyped-decorator]
def _reduce_tiles(  # type: ignore[no-untyped-def]
    logits,
    peaks,
    sums,
    weighted,
    maxima,
    group_maxima,
    block_sums,
    stride,
    vocab_size,
    num_programs,
    taus: tl.constexpr,
    sampling: tl.constexpr,
    block: tl.constexpr,
    blocks: tl.constexpr,
    group: tl.constexpr,
):
    """Reduce one tile per program; the tiles of a row follow each other.

    sums [temperatures, n, tiles] and weighted [n, tiles], the sum of x exp(x), are relative to the
    maximum of the tile: x = logit - maximum.
    """
    program = tl.program_id(0).to(tl.int64)  # row * stride may exceed 32 bits
    tiles = tl.cdiv(vocab_size, blocks * block)
    row = program // tiles
    first = (program % tiles) * (blocks * block)
    ids = tl.arange(0, blocks)[:, None] * block + tl.arange(0, block)[None, :]
    valid = ids < (vocab_size - first).to(tl.int32)
    z = tl.load(logits + row * stride + first + ids, mask=valid, other=float("-inf"))
    block_peaks = tl.max(z, 1)
    tl.store(maxima + program * blocks + tl.arange(0, blocks), block_peaks)
    group_peaks = tl.max(tl.reshape(block_peaks, [blocks // group, group]), 1)
    groups: tl.constexpr = blocks // group
    tl.store(group_maxima + program * groups + tl.arange(0, groups), group_peaks)
    peak = tl.max(block_peaks, 0)
    tl.store(peaks + program, peak)
    x = z - tl.maximum(peak, _LOWEST)  # if all logits are -inf, -inf - -inf would be NaN
    exponentials = x
    for i in tl.static_range(len(taus)):
        # exp(x / 2) is the square of exp(x / 4), and a product costs less than an exp.
        if i > 0 and taus[i - 1] == 2.0 * taus[i]:
            exponentials = exponentials * exponentials
        else:
            exponentials = tl.exp(x * (1.0 / taus[i]))
        if taus[i] == 1.0:
            tl.store(weighted + program, tl.sum(tl.sum(tl.where(valid, x * exponentials, 0.0), 1)))
        of_blocks = tl.sum(exponentials, 1)
        tl.store(sums + i * num_programs + program, tl.sum(of_blocks, 0))
        if sampling and taus[i] == 1.0:
            tl.store(block_sums + program * blocks + tl.arange(0, blocks), of_blocks)


@triton.jit  # type: ignore[untyped-decorator]
def _combine(  # type: ignore[no-untyped-def]
    logits,
    peaks,
    sums,
    weighted,
    maxima,
    group_maxima,
    peak,
    log_total,
    lse,
    lse_tau,
    entropy,
    logprobs,
    ids,
    scratch,
    stride,
    vocab_size,
    tiles,
    num_tiles,
    k,
    temperatures: tl.constexpr,
    columns: tl.constexpr,
    column_of_one: tl.constexpr,
    tiles_padded: tl.constexpr,
    groups_padded: tl.constexpr,
    ids_padded: tl.constexpr,
    block: tl.constexpr,
    blocks: tl.constexpr,
    group: tl.constexpr,
):
    """Combine the tiles of one row per program, and find its k largest logits."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, tiles_padded)
    real = tile < tiles
    places = row * tiles + tile
    tile_peaks = tl.load(peaks + places, mask=real, other=float("-inf"))
    row_peak = tl.max(tile_peaks, 0)
    # NaN if all logits are -inf, as by `reduce_torch`; 0 for the padding
    x = tl.where(real, tile_peaks - row_peak, 0.0)
    at_one = tl.load(sums + column_of_one * num_tiles + places, mask=real, other=0.0)
    scaled = at_one * tl.exp(x)
    total = tl.sum(scaled, 0)
    of_x = tl.load(weighted + places, mask=real, other=0.0) * tl.exp(x)
    # sum (logit - row's peak) exp(...) = sum (logit - tile's peak) exp(...) + x sum exp(...)
    mean_x = tl.sum(tl.where(scaled == 0.0, of_x, of_x + x * scaled), 0) / total
    row_log_total = tl.log(total)
    tl.store(peak + row, row_peak)
    tl.store(log_total + row, row_log_total)
    tl.store(lse + row, row_peak + row_log_total)
    row_entropy = row_log_total - mean_x
    tl.store(entropy + row, tl.where(row_entropy < 0.0, 0.0, row_entropy))  # NaN stays NaN
    for i in tl.static_range(len(temperatures)):
        parts = tl.load(sums + columns[i] * num_tiles + places, mask=real, other=0.0)
        at_tau = tl.sum(parts * tl.exp(x * (1.0 / temperatures[i])), 0)
        value = tl.log(at_tau) - row_log_total * (1.0 / temperatures[i])
        tl.store(lse_tau + row * len(temperatures) + i, value)
    if ids_padded > 0:
        tile_groups: tl.constexpr = blocks // group
        found_at = scratch + row * 4 * k
        start = logits + row * stride
        slots = tl.arange(0, ids_padded)
        index = tl.arange(0, groups_padded)
        valid = index * (group * block) < vocab_size
        source = group_maxima + row * tiles * tile_groups + index
        keys = _keys_of(tl.load(source, mask=valid, other=float("-inf")), valid)
        count = _write_largest(keys, index, valid, k, found_at)
        # Blocks of the chosen groups
        index = _members_of_chosen(found_at, count, slots, group)
        valid = (index >= 0) & (index * block < vocab_size)
        source = maxima + row * tiles * blocks + index
        keys = _keys_of(tl.load(source, mask=valid, other=float("-inf")), valid)
        count = _write_largest(keys, index, valid, k, found_at + k)
        # Groups of logits in the chosen blocks
        index = _members_of_chosen(found_at + k, count, slots, block // group)
        valid = (index >= 0) & (index * group < vocab_size)
        found = tl.full([ids_padded * group], float("-inf"), tl.float32)
        for member in tl.static_range(group):  # all at once would need eight times the registers
            place = index * group + member
            mask = valid & (place < vocab_size)
            found = tl.maximum(found, tl.load(start + place, mask=mask, other=float("-inf")))
        count = _write_largest(_keys_of(found, valid), index, valid, k, found_at + 2 * k)
        # Logits of the chosen groups
        index = _members_of_chosen(found_at + 2 * k, count, slots, group)
        valid = (index >= 0) & (index < vocab_size)
        keys = _keys_of(tl.load(start + index, mask=valid, other=float("-inf")), valid)
        _write_largest(keys, index, valid, k, found_at + 3 * k)
        # An id's place is the number of ids that come before it: of larger logit, or lower.
        kept = slots < k
        own_id = tl.load(found_at + 3 * k + slots, mask=kept, other=0)
        own = tl.load(start + own_id, mask=kept, other=float("-inf"))
        own_key = _keys_of(own, kept)
        place = tl.zeros([ids_padded], tl.int32)
        for first in range(0, k, group):
            slots_of_others = first + tl.arange(0, group)
            in_range = slots_of_others < k
            other_id = tl.load(found_at + 3 * k + slots_of_others, mask=in_range, other=0)
            other = tl.load(start + other_id, mask=in_range, other=float("-inf"))
            other_key = _keys_of(other, in_range)
            before = other_key[None, :] > own_key[:, None]
            before |= (other_key[None, :] == own_key[:, None]) & (
                other_id[None, :] < own_id[:, None]
            )
            place += tl.sum((before & in_range[None, :]).to(tl.int32), 1)
        tl.store(logprobs + row * k + place, own - row_peak - row_log_total, mask=kept)
        tl.store(ids + row * k + place, own_id.to(tl.int64), mask=kept)


@triton.jit
def _keys_of(values, valid):  # type: ignore[no-untyped-def]
    """Return int32 keys that order like the float32 values, the lowest for what is not valid.

    An integer orders like the float with the same bits, once those of negative ones are inverted.
    """
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(valid, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), _LOWEST_KEY)


@triton.jit
def _write_largest(keys, index, valid, k, out):  # type: ignore[no-untyped-def]
    """Write the indices of the k largest valid keys, in ascending order; return their number.

    The k-th largest key is found bit by bit, from the sign on: it is the largest number that k keys
    reach. Among keys equal to it the first ones are taken.
    """
    count = tl.minimum(tl.sum(valid.to(tl.int32), 0), k)
    limit = tl.full([], _LOWEST_KEY, tl.int32)
    bit = tl.full([], _LOWEST_KEY, tl.int32)
    for _ in range(32):
        higher = limit ^ bit
        reached = tl.sum((keys >= higher).to(tl.int32), 0)
        limit = tl.where(reached >= count, higher, limit)
        bit = (bit >> 1) & 0x7FFFFFFF
    greater = keys > limit
    equal = ((keys == limit) & valid).to(tl.int32)
    wanted = count - tl.sum(greater.to(tl.int32), 0)
    chosen = greater | ((equal > 0) & (tl.cumsum(equal, 0) <= wanted))
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(out + place, index, mask=chosen)
    tl.debug_barrier()  # other threads of this program read them
    return count


@triton.jit  # type: ignore[untyped-decorator]
def _members_of_chosen(chosen, count, slots, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the indices of the members of the chosen groups, negative after the last group."""
    groups = tl.load(chosen + slots, mask=slots < count, other=-1)
    members = groups[:, None] * size + tl.arange(0, size)[None, :]
    return tl.reshape(members, [slots.shape[0] * size])


@triton.jit  # type: ignore[untyped-decorator]
def _write_weights_outside(  # type: ignore[no-untyped-def]
    logits,
    lse,
    kept,
    blocks,
    weights,
    stride,
    vocab_size,
    chosen,
    num_kept,
    block: tl.constexpr,
    step: tl.constexpr,
):
    """Write the weights of one chosen block per program."""
    program = tl.program_id(0).to(tl.int64)
    row = program // chosen
    ids = tl.load(blocks + program) * block + tl.arange(0, block)
    z = tl.load(logits + row * stride + ids, mask=ids < vocab_size, other=float("-inf"))
    weight = tl.exp(z - tl.load(lse + row))
    for first in range(0, num_kept, step):
        which = first + tl.arange(0, step)
        taken = tl.load(kept + row * num_kept + which, mask=which < num_kept, other=-1)
        hits = tl.sum((ids[:, None] == taken[None, :]).to(tl.int32), 1)
        weight = tl.where(hits > 0, 0.0, weight)
    tl.store(weights + program * block + tl.arange(0, block), weight)
