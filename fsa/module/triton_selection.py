"""Selection of blocks in Triton: scores of a chunk of query tokens into a workspace, then the top-k of every row.

    block_scores    P = exp(softmax_scale QK^T - lse), summed over the heads of the group in registers, then over the
                    windows of a block
    select_topk     the threshold of a row by bisection over the bits of its scores; ids in ascending order

A program of block_scores keeps its tile of query tokens and walks a few tiles of windows. The columns of a tile of
scores are ordered so that the windows of a block stand in registers of one thread: column r * TILE_BLOCKS + j is window
r of block j. A window that begins in block j - 1 may reach into block j; tiles therefore overlap by one block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fsa.module.score_chunks import empty_scores, plan_chunks
from fsa.module.triton_windows import SIZES, choose_tiles, load_normaliser, load_seen_rows, seen_windows
from triton_ref.common import LOG2_E, load_rows, matmul, padded_dim, sequence_bounds, sequence_of_query

# TILE_WINDOWS: windows, and so columns, of a tile. WALK: tiles of windows that a program walks. maxnreg: registers a
# thread, so that three CTAs fit an SM.
SCORES_TILES = {
    "wgmma": {
        128: {"TILE_Q": 64, "TILE_WINDOWS": 128, "WALK": 4, "num_warps": 4, "num_stages": 2, "maxnreg": 168},
        256: {"TILE_Q": 64, "TILE_WINDOWS": 64, "WALK": 8, "num_warps": 4, "num_stages": 2},
    },
    "mma": {256: {"TILE_Q": 64, "TILE_WINDOWS": 64, "WALK": 8, "num_warps": 4, "num_stages": 2}},
    "fp32": {
        64: {"TILE_Q": 32, "TILE_WINDOWS": 32, "WALK": 2, "num_warps": 4, "num_stages": 1},
        256: {"TILE_Q": 16, "TILE_WINDOWS": 16, "WALK": 4, "num_warps": 4, "num_stages": 1},
    },
}
# One head a group: queries stay on chip, keys are what is read again and again, so tiles have more queries.
SINGLE_HEAD_TILES = {
    **SCORES_TILES,
    "wgmma": {
        128: {"TILE_Q": 128, "TILE_WINDOWS": 64, "WALK": 8, "num_warps": 8, "num_stages": 3},
        256: {"TILE_Q": 128, "TILE_WINDOWS": 64, "WALK": 8, "num_warps": 8, "num_stages": 2},
    },
}
# Scores that the top-k keeps in registers. Rows stay inside a warp while they can, so that counts need no barrier.
KEYS_PER_TILE = 1024
KEYS_PER_WARP = 2048
MAX_TOPK_WARPS = 16
LANES = tl.constexpr(32)  # of a warp; their maxima of a row bound its threshold from below
LANE_KEYS = tl.constexpr(4)  # neighbouring scores that a lane loads at once
FORCED_KEY = tl.constexpr(0x7FFFFFFE)  # of a block that is always taken: above the bits of infinity


@triton.jit
def first_tile(sequence, cu_seqlens, chunk_begin, chunk_end, TILE_Q: tl.constexpr):
    """(number of a sequence's first tile among those of a chunk, its first query token in the chunk).

    A sequence of n tokens owns ceil(n / TILE_Q) numbers, which never reach the next sequence's first.
    """
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence), chunk_begin), chunk_end)
    return (begin - chunk_begin) // TILE_Q + sequence, begin


@triton.jit
def sequence_of_tile(tile, cu_seqlens, batch, chunk_begin, chunk_end, TILE_Q: tl.constexpr):
    """The last sequence whose first tile is not after `tile`, by bisection."""
    low = tile * 0
    high = low + batch
    while high - low > 1:
        middle = (low + high) // 2
        number, _ = first_tile(middle, cu_seqlens, chunk_begin, chunk_end, TILE_Q)
        low = tl.where(number > tile, low, middle)
        high = tl.where(number > tile, middle, high)
    return low


@triton.jit
def sum_over_windows(probs, RATIO: tl.constexpr, SPAN: tl.constexpr, COLUMNS: tl.constexpr, TILE_BLOCKS: tl.constexpr):
    """[rows, COLUMNS * TILE_BLOCKS] -> [rows, TILE_BLOCKS]: the score of each block but the tile's first, if SPAN > 1.

    A block has RATIO strides, a window SPAN: window r of a block covers min(SPAN, RATIO - r) strides of it, and the
    rest of the next block.
    """
    rows: tl.constexpr = probs.shape[0]
    windows = tl.reshape(probs, [rows, COLUMNS, TILE_BLOCKS])
    r = tl.arange(0, COLUMNS)[None, :, None]
    scores = tl.sum(windows * tl.where(r < RATIO, tl.minimum(RATIO - r, SPAN), 0).to(tl.float32), 1)
    if SPAN > 1:
        over = tl.where(r < RATIO, tl.maximum(r + SPAN - RATIO, 0), 0)
        over_next = tl.sum(windows * over.to(tl.float32), 1)
        left = tl.maximum(tl.arange(0, TILE_BLOCKS) - 1, 0)
        scores += tl.gather(over_next, tl.broadcast_to(left[None, :], [rows, TILE_BLOCKS]), 1)
    return scores


@triton.jit(do_not_specialize=SIZES)
def block_scores_kernel(
    q,  # [total, num_heads, head_dim]
    k,  # [max_windows, num_kv_heads, head_dim]
    lse,  # [num_heads, total], natural log
    cu_seqlens,  # [batch + 1]
    compressed_cu_seqlens,  # [batch + 1]
    scores,  # [chunk_end - chunk_begin, num_kv_heads, scores_stride], fp32
    q_token_stride,
    q_head_stride,
    k_window_stride,
    k_head_stride,
    scores_stride,
    batch,
    total,
    max_windows,
    num_kv_heads,
    chunk_begin,
    chunk_end,
    num_splits,
    softmax_scale_log2,
    GROUP_SIZE: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_Q: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    WALK: tl.constexpr,
):
    RATIO: tl.constexpr = BLOCK_SIZE // KERNEL_STRIDE
    SPAN: tl.constexpr = KERNEL_SIZE // KERNEL_STRIDE
    OVERLAP: tl.constexpr = 1 if SPAN > 1 else 0
    NEW_BLOCKS: tl.constexpr = TILE_BLOCKS - OVERLAP  # from tile to tile
    split = tl.program_id(0) % num_splits
    kv_head = (tl.program_id(0) // num_splits % num_kv_heads).to(tl.int64)
    tile = tl.program_id(0) // num_splits // num_kv_heads

    # A tile of query tokens of one sequence; those past its end, or the chunk's, repeat the last one.
    sequence = sequence_of_tile(tile, cu_seqlens, batch, chunk_begin, chunk_end, TILE_Q)
    tile_of_sequence, chunk_query = first_tile(sequence, cu_seqlens, chunk_begin, chunk_end, TILE_Q)
    q_begin, q_len = sequence_bounds(sequence, cu_seqlens, total)
    q_end = tl.minimum(q_begin + q_len, chunk_end)
    first_query = chunk_query + (tile - tile_of_sequence) * TILE_Q
    last_query = tl.minimum(first_query + TILE_Q, q_end) - 1
    num_blocks = (last_query - q_begin) // BLOCK_SIZE + 1
    if (first_query >= q_end) | (split * WALK * NEW_BLOCKS >= num_blocks):
        return
    query = tl.minimum(first_query + tl.arange(0, TILE_Q), last_query)
    begin, end = seen_windows(
        query, cu_seqlens, compressed_cu_seqlens, batch, total, max_windows, KERNEL_SIZE, KERNEL_STRIDE
    )
    first_window, seen_by_all, seen_by_any = tl.min(begin, 0), tl.min(end, 0), tl.max(end, 0)
    exists = first_query + tl.arange(0, TILE_Q) < q_end
    rows = ((query - chunk_begin).to(tl.int64) * num_kv_heads + kv_head) * scores_stride
    q_offsets = query.to(tl.int64) * q_token_stride
    if GROUP_SIZE == 1:
        q_tile = load_seen_rows(q, q_offsets + kv_head * q_head_stride, exists, False, HEAD_DIM, PADDED_DIM)
        lse_log2 = load_normaliser(lse, kv_head, query, exists, total)

    # Window r of block j in column r * TILE_BLOCKS + j
    column = tl.arange(0, COLUMNS * TILE_BLOCKS)
    last_tile = tl.minimum((split + 1) * WALK, tl.cdiv(num_blocks, NEW_BLOCKS))
    for window_tile in range(split * WALK, last_tile):
        first_block = window_tile * NEW_BLOCKS - OVERLAP
        column_block = first_block + column % TILE_BLOCKS
        window = first_window + column_block * RATIO + column // TILE_BLOCKS
        real = (column_block >= 0) & (column // TILE_BLOCKS < RATIO) & (window < seen_by_any)
        k_offsets = window.to(tl.int64) * k_window_stride + kv_head * k_head_stride
        k_tile = load_rows(k, k_offsets, real, HEAD_DIM, PADDED_DIM)

        if GROUP_SIZE == 1:
            probs = tl.exp2(matmul(q_tile, tl.trans(k_tile)) * softmax_scale_log2 - lse_log2[:, None])
        else:
            probs = tl.zeros([TILE_Q, COLUMNS * TILE_BLOCKS], tl.float32)
            for group in range(GROUP_SIZE):
                head = kv_head * GROUP_SIZE + group
                q_tile = load_seen_rows(q, q_offsets + head * q_head_stride, exists, False, HEAD_DIM, PADDED_DIM)
                lse_log2 = load_normaliser(lse, head, query, exists, total)
                probs += tl.exp2(matmul(q_tile, tl.trans(k_tile)) * softmax_scale_log2 - lse_log2[:, None])
        if (first_block < 0) | (first_window + (first_block + TILE_BLOCKS) * RATIO > seen_by_all) | (COLUMNS > RATIO):
            probs = tl.where(real[None, :] & (window[None, :] < end[:, None]), probs, 0.0)

        block_scores = sum_over_windows(probs, RATIO, SPAN, COLUMNS, TILE_BLOCKS)
        block = first_block + tl.arange(0, TILE_BLOCKS)
        kept = (tl.arange(0, TILE_BLOCKS) >= OVERLAP) & (block < scores_stride)
        tl.store(scores + rows[:, None] + block[None, :], block_scores, mask=exists[:, None] & kept[None, :])


@triton.jit
def kth_largest(keys, wanted, low, high):
    """The largest key of each row that at least `wanted` of its keys reach, by bisection in [low, high).

    At least `wanted` keys reach low, at most `wanted` reach high. Stops early at a smaller one that exactly `wanted`
    reach.
    """
    while tl.max(high - low, 0) > 1:
        middle = low + (high - low) // 2
        reached = tl.sum((keys >= middle[:, None]).to(tl.int32), 1)
        high = tl.where(reached == wanted, middle + 1, tl.where(reached > wanted, high, middle))
        low = tl.where(reached >= wanted, middle, low)
    return low


@triton.jit(do_not_specialize=SIZES)
def select_topk_kernel(
    scores,  # [chunk_end - chunk_begin, num_kv_heads, scores_stride], fp32; the stride is a multiple of LANE_KEYS
    cu_seqlens,  # [batch + 1]
    topk_idx,  # [num_kv_heads, total, topk], int32
    scores_stride,
    batch,
    total,
    num_kv_heads,
    chunk_begin,
    chunk_end,
    topk,
    init_blocks,
    local_blocks,
    BLOCK_SIZE: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
    PADDED_TOPK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)  # (query token of the chunk, KV head)
    query = chunk_begin + row // num_kv_heads
    exists = query < chunk_end
    sequence = sequence_of_query(tl.minimum(query, total - 1), cu_seqlens, batch)
    q_begin, q_len = sequence_bounds(sequence, cu_seqlens, total)
    position = query - q_begin
    num_visible = tl.where(exists & (position >= 0) & (position < q_len), position // BLOCK_SIZE + 1, 0)
    wanted = tl.minimum(num_visible, topk)
    num_forced = tl.minimum(num_visible, init_blocks + local_blocks)

    # Scores are not negative, so their bits are ordered as they are. Whole vectors are read: to the stride at most.
    block = tl.arange(0, PADDED_BLOCKS)[None, :]
    row_scores = scores + row.to(tl.int64)[:, None] * (scores_stride // LANE_KEYS * LANE_KEYS)
    loaded = block // LANE_KEYS * LANE_KEYS < num_visible[:, None]
    score = tl.load(row_scores + block, mask=loaded, other=0.0)
    unforced_keys = tl.where(score == score, score, 0.0).to(tl.int32, bitcast=True)  # NaN counts as 0
    unforced = (block >= init_blocks) & (block < num_visible[:, None] - local_blocks)
    unforced_keys = tl.where(unforced, unforced_keys, -1)
    keys = tl.where(unforced, unforced_keys, tl.where(block < num_visible[:, None], FORCED_KEY, -1))

    low = wanted * 0
    if PADDED_TOPK <= LANES and PADDED_BLOCKS >= LANES * LANE_KEYS:
        # What enough maxima reach, enough keys reach.
        lanes = tl.reshape(unforced_keys, [TILE_ROWS, PADDED_BLOCKS // (LANES * LANE_KEYS), LANES, LANE_KEYS])
        maxima = tl.max(tl.max(lanes, 3), 1)
        high = tl.max(maxima, 1) + 2
        enough = tl.sum((maxima >= 0).to(tl.int32), 1) >= wanted - num_forced
        low = tl.where(enough, kth_largest(maxima, wanted - num_forced, low, high), low)
    else:
        high = tl.max(unforced_keys, 1) + 2
    low = tl.where(wanted == num_visible, 0, low)
    high = tl.where(wanted == num_visible, 1, high)
    threshold = kth_largest(keys, wanted, low, high)[:, None]

    too_many = tl.sum((keys >= threshold).to(tl.int32), 1) - wanted
    if tl.max(too_many, 0) > 0:  # keys equal to the threshold: the lowest ids of them are taken
        tied = (keys == threshold).to(tl.int32)
        ties_up_to = tl.cumsum(tied, 1)
        ties_taken = (tl.sum(tied, 1) - too_many)[:, None]
        keys = tl.where((tied == 1) & (ties_up_to > ties_taken), -1, keys)

    taken = (keys >= threshold).to(tl.int32)
    slot = tl.cumsum(taken, 1) - taken
    selected = topk_idx + (((row % num_kv_heads).to(tl.int64) * total + query) * topk)[:, None]
    tl.store(selected + slot, tl.broadcast_to(block, [TILE_ROWS, PADDED_BLOCKS]), mask=taken == 1)
    unused = tl.arange(0, PADDED_TOPK)[None, :]
    tl.store(selected + unused, -1, mask=exists[:, None] & (unused >= wanted[:, None]) & (unused < topk))


def scores_tiles(q: torch.Tensor, group_size: int, ratio: int) -> dict[str, int]:
    """Tile sizes, warps, pipeline stages and registers of block_scores, for blocks of `ratio` strides."""
    tiles = dict(choose_tiles(SINGLE_HEAD_TILES if group_size == 1 else SCORES_TILES, q))
    columns = triton.next_power_of_2(ratio)
    tile_blocks = max(2, tiles.pop("TILE_WINDOWS") // columns)
    return {**tiles, "COLUMNS": columns, "TILE_BLOCKS": tile_blocks}


def select_blocks(
    q: torch.Tensor,
    compressed_k: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    compressed_cu_seqlens: torch.Tensor,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    softmax_scale: float,
) -> torch.Tensor:
    """The blocks with the largest sums of attention probabilities, for every KV head and query token.

    Args:
        q: [total, num_heads, head_dim], fp16, bf16 or fp32; it and the next as `fsa.pipeline.as_kernel_input` leaves
            them.
        compressed_k: [max_windows, num_kv_heads, head_dim], dtype of q.
        lse: [num_heads, total], fp32, contiguous, natural log: of the compressed attention.
        cu_seqlens, compressed_cu_seqlens: [batch + 1], int32, contiguous.
        kernel_size, kernel_stride, block_size: tokens of a window, from window to window, of a block; the stride
            divides both sizes, and a window is not larger than a block.
        topk: slots a row.
        init_blocks, local_blocks: so many blocks from the first, and up to the token's own, are always taken.
        softmax_scale: positive factor of the scores.

    Returns:
        topk_idx: int32 [num_kv_heads, total, topk], ascending, -1 in unused slots, which come last. Equal scores: the
        lower id is taken first.

    Beside it 64 MiB are allocated at most, or the scores of one tile of query tokens if that is more. Up to 65,535
    blocks of all sequences together.
    """
    (total, num_heads, head_dim), (max_windows, num_kv_heads, _) = q.shape, compressed_k.shape
    topk_idx = torch.empty((num_kv_heads, total, topk), dtype=torch.int32, device=q.device)
    if total == 0:
        return topk_idx
    group_size = num_heads // num_kv_heads
    tiles = scores_tiles(q, group_size, block_size // kernel_stride)
    blocks_a_program = (tiles["TILE_BLOCKS"] - (kernel_size > kernel_stride)) * tiles["WALK"]
    chunks = plan_chunks(total, num_kv_heads, block_size, tiles["TILE_Q"])
    scores = empty_scores(chunks, num_kv_heads, q.device)
    sizes = {"batch": cu_seqlens.shape[0] - 1, "total": total, "num_kv_heads": num_kv_heads}
    with torch.cuda.device_of(q):
        for chunk in chunks:
            num_tokens = chunk.end - chunk.begin
            num_blocks = triton.cdiv(chunk.end, block_size)  # no token of the chunk is in a later one of its sequence
            num_splits = triton.cdiv(num_blocks, blocks_a_program)
            num_tiles = triton.cdiv(num_tokens, tiles["TILE_Q"]) + sizes["batch"]
            block_scores_kernel[(num_tiles * num_kv_heads * num_splits,)](
                q,
                compressed_k,
                lse,
                cu_seqlens,
                compressed_cu_seqlens,
                scores,
                *q.stride()[:2],
                *compressed_k.stride()[:2],
                chunk.stride,
                **sizes,
                max_windows=max_windows,
                chunk_begin=chunk.begin,
                chunk_end=chunk.end,
                num_splits=num_splits,
                softmax_scale_log2=softmax_scale * LOG2_E.value,
                GROUP_SIZE=group_size,
                KERNEL_SIZE=kernel_size,
                KERNEL_STRIDE=kernel_stride,
                BLOCK_SIZE=block_size,
                HEAD_DIM=head_dim,
                PADDED_DIM=padded_dim(head_dim),
                **tiles,
            )
            padded_blocks = max(32, triton.next_power_of_2(num_blocks))
            tile_rows = max(KEYS_PER_TILE // padded_blocks, 1)
            select_topk_kernel[(triton.cdiv(num_tokens * num_kv_heads, tile_rows),)](
                scores,
                cu_seqlens,
                topk_idx,
                chunk.stride,
                **sizes,
                chunk_begin=chunk.begin,
                chunk_end=chunk.end,
                topk=topk,
                init_blocks=init_blocks,
                local_blocks=local_blocks,
                BLOCK_SIZE=block_size,
                PADDED_BLOCKS=padded_blocks,
                PADDED_TOPK=triton.next_power_of_2(topk),
                TILE_ROWS=tile_rows,
                num_warps=min(max(padded_blocks // KEYS_PER_WARP, 1), MAX_TOPK_WARPS),
            )
    return topk_idx
