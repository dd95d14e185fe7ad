"""Selection of blocks in Triton: scores of a chunk of query tokens into a workspace, then the top-k of every row.

    block_scores    P = exp(softmax_scale QK^T - lse), summed over the heads of the group in registers, then over the
                    windows of a block
    select_topk     the threshold of a row by bisection over the bits of its scores; ids in ascending order

The columns of a tile of scores are ordered so that the windows of a block stand in registers of one thread: column
r * TILE_BLOCKS + j is window r of block j. A window that begins in block j - 1 may reach into block j; tiles therefore
overlap by one block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fsa.module.triton_windows import SIZES, choose_tiles, load_normaliser, seen_windows
from triton_ref.common import LOG2_E, load_rows, matmul, padded_dim, sequence_bounds, sequence_of_query

WORKSPACE_BYTES = 64 * 2**20  # of the scores of a chunk at most, beyond one tile of query tokens
# TILE_WINDOWS: windows, and so columns, of a tile.
SCORES_TILES = {
    "wgmma": {
        128: {"TILE_Q": 64, "TILE_WINDOWS": 128, "num_warps": 4, "num_stages": 2},
        256: {"TILE_Q": 64, "TILE_WINDOWS": 64, "num_warps": 4, "num_stages": 2},
    },
    "mma": {256: {"TILE_Q": 64, "TILE_WINDOWS": 64, "num_warps": 4, "num_stages": 2}},
    "fp32": {
        64: {"TILE_Q": 32, "TILE_WINDOWS": 32, "num_warps": 4, "num_stages": 1},
        256: {"TILE_Q": 16, "TILE_WINDOWS": 16, "num_warps": 4, "num_stages": 1},
    },
}
# Scores that the top-k keeps in registers. Rows stay inside a warp while they can, so that counts need no barrier.
KEYS_PER_TILE = 1024
KEYS_PER_WARP = 2048
MAX_TOPK_WARPS = 16

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
    num_window_tiles,
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
):
    RATIO: tl.constexpr = BLOCK_SIZE // KERNEL_STRIDE
    SPAN: tl.constexpr = KERNEL_SIZE // KERNEL_STRIDE
    OVERLAP: tl.constexpr = 1 if SPAN > 1 else 0
    window_tile = tl.program_id(0) % num_window_tiles
    kv_head = (tl.program_id(0) // num_window_tiles % num_kv_heads).to(tl.int64)
    tile = tl.program_id(0) // num_window_tiles // num_kv_heads

    # A tile of query tokens of one sequence
    sequence = sequence_of_tile(tile, cu_seqlens, batch, chunk_begin, chunk_end, TILE_Q)
    tile_of_sequence, chunk_query = first_tile(sequence, cu_seqlens, chunk_begin, chunk_end, TILE_Q)
    q_begin, q_len = sequence_bounds(sequence, cu_seqlens, total)
    q_end = tl.minimum(q_begin + q_len, chunk_end)
    query = chunk_query + (tile - tile_of_sequence) * TILE_Q + tl.arange(0, TILE_Q)
    last_query = tl.minimum(tl.max(query, 0), q_end - 1)
    block = window_tile * (TILE_BLOCKS - OVERLAP) - OVERLAP + tl.arange(0, TILE_BLOCKS)
    if (tl.min(query, 0) >= q_end) | (tl.min(block, 0) + OVERLAP > (last_query - q_begin) // BLOCK_SIZE):
        return
    exists = query < q_end
    query = tl.minimum(query, q_end - 1)
    begin, end = seen_windows(
        query, cu_seqlens, compressed_cu_seqlens, batch, total, max_windows, KERNEL_SIZE, KERNEL_STRIDE
    )

    # Window r of block j in column r * TILE_BLOCKS + j
    column = tl.arange(0, COLUMNS * TILE_BLOCKS)
    column_block = tl.min(block, 0) + column % TILE_BLOCKS
    window = tl.min(begin, 0) + column_block * RATIO + column // TILE_BLOCKS
    real = (column_block >= 0) & (column // TILE_BLOCKS < RATIO) & (window < tl.max(end, 0))
    k_offsets = window.to(tl.int64) * k_window_stride + kv_head * k_head_stride
    k_tile = load_rows(k, k_offsets, real, HEAD_DIM, PADDED_DIM)

    probs = tl.zeros([TILE_Q, COLUMNS * TILE_BLOCKS], tl.float32)
    q_offsets = query.to(tl.int64) * q_token_stride
    for group in range(GROUP_SIZE):
        head = kv_head * GROUP_SIZE + group
        q_tile = load_rows(q, q_offsets + head * q_head_stride, exists, HEAD_DIM, PADDED_DIM)
        lse_log2 = load_normaliser(lse, head, query, exists, total)
        probs += tl.exp2(matmul(q_tile, tl.trans(k_tile)) * softmax_scale_log2 - lse_log2[:, None])
    probs = tl.where(real[None, :] & (window[None, :] < end[:, None]), probs, 0.0)

    block_scores = sum_over_windows(probs, RATIO, SPAN, COLUMNS, TILE_BLOCKS)
    rows = ((query - chunk_begin).to(tl.int64) * num_kv_heads + kv_head) * scores_stride
    kept = (tl.arange(0, TILE_BLOCKS) >= OVERLAP) & (block < scores_stride)
    tl.store(scores + rows[:, None] + block[None, :], block_scores, mask=exists[:, None] & kept[None, :])


@triton.jit
def kth_largest(keys, wanted, num_keys):
    """The largest key of each row that at least `wanted` of its keys reach, by bisection; 0 if wanted is num_keys.

    Stops early at a smaller one that exactly `wanted` reach.
    """
    low = wanted * 0
    high = tl.where(wanted == num_keys, 1, FORCED_KEY + 1)
    while tl.max(high - low, 0) > 1:
        middle = low + (high - low) // 2
        reached = tl.sum((keys >= middle[:, None]).to(tl.int32), 1)
        enough = (reached >= wanted) | (high - low == 1)  # a row that is done stays as it is
        high = tl.where(reached == wanted, middle + 1, tl.where(enough, high, middle))
        low = tl.where(enough, middle, low)
    return low


@triton.jit(do_not_specialize=SIZES)
def select_topk_kernel(
    scores,  # [chunk_end - chunk_begin, num_kv_heads, scores_stride], fp32
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

    # Scores are not negative, so their bits are ordered as they are.
    block = tl.arange(0, PADDED_BLOCKS)[None, :]
    visible = block < num_visible[:, None]
    forced = (block < init_blocks) | (block >= num_visible[:, None] - local_blocks)
    row_scores = scores + row.to(tl.int64)[:, None] * scores_stride
    score = tl.load(row_scores + block, mask=visible & (forced == 0), other=0.0)
    keys = tl.where(score == score, score, 0.0).to(tl.int32, bitcast=True)  # NaN counts as 0
    keys = tl.where(visible, tl.where(forced, FORCED_KEY, keys), -1)

    threshold = kth_largest(keys, wanted, num_visible)[:, None]
    above = keys > threshold
    tied = keys == threshold
    ties_taken = (wanted - tl.sum(above.to(tl.int32), 1))[:, None]  # the lowest ids of them

    # One prefix sum for both counts: above in the low half, tied in the high half.
    both = above.to(tl.uint32) + (tied.to(tl.uint32) << 16)
    before = tl.cumsum(both, 1) - both
    ties_before = (before >> 16).to(tl.int32)
    slot = (before & 0xFFFF).to(tl.int32) + tl.minimum(ties_before, ties_taken)
    taken = above | (tied & (ties_before < ties_taken))
    selected = topk_idx + (((row % num_kv_heads).to(tl.int64) * total + query) * topk)[:, None]
    tl.store(selected + slot, tl.broadcast_to(block, [TILE_ROWS, PADDED_BLOCKS]), mask=taken)
    unused = tl.arange(0, PADDED_TOPK)[None, :]
    tl.store(selected + unused, -1, mask=exists[:, None] & (unused >= wanted[:, None]) & (unused < topk))


def scores_tiles(q: torch.Tensor, ratio: int) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages of block_scores, for blocks of `ratio` strides."""
    tiles, columns = dict(choose_tiles(SCORES_TILES, q)), triton.next_power_of_2(ratio)
    tile_blocks = max(2, tiles.pop("TILE_WINDOWS") // columns)
    return {**tiles, "COLUMNS": columns, "TILE_BLOCKS": tile_blocks}


def chunk_tokens(total: int, num_kv_heads: int, num_blocks: int, tile_q: int) -> int:
    """Query tokens whose scores fit the workspace: a multiple of tile_q."""
    affordable = WORKSPACE_BYTES // (4 * num_kv_heads * num_blocks)
    return min(max(affordable // tile_q, 1) * tile_q, triton.cdiv(total, tile_q) * tile_q)


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
    blocks a sequence.
    """
    (total, num_heads, head_dim), (max_windows, num_kv_heads, _) = q.shape, compressed_k.shape
    topk_idx = torch.empty((num_kv_heads, total, topk), dtype=torch.int32, device=q.device)
    if total == 0:
        return topk_idx
    tiles = scores_tiles(q, block_size // kernel_stride)
    blocks_a_tile = tiles["TILE_BLOCKS"] - (kernel_size > kernel_stride)
    scores_stride = triton.cdiv(triton.cdiv(total, block_size), 16) * 16
    chunk = chunk_tokens(total, num_kv_heads, scores_stride, tiles["TILE_Q"])
    scores = torch.empty((chunk, num_kv_heads, scores_stride), dtype=torch.float32, device=q.device)
    sizes = {"batch": cu_seqlens.shape[0] - 1, "total": total, "num_kv_heads": num_kv_heads}
    with torch.cuda.device_of(q):
        for chunk_begin in range(0, total, chunk):
            chunk_end = min(chunk_begin + chunk, total)
            num_blocks = triton.cdiv(chunk_end, block_size)  # no token of the chunk is in a later one of its sequence
            num_window_tiles = triton.cdiv(num_blocks, blocks_a_tile)
            num_tiles = triton.cdiv(chunk_end - chunk_begin, tiles["TILE_Q"]) + sizes["batch"]
            block_scores_kernel[(num_tiles * num_kv_heads * num_window_tiles,)](
                q,
                compressed_k,
                lse,
                cu_seqlens,
                compressed_cu_seqlens,
                scores,
                *q.stride()[:2],
                *compressed_k.stride()[:2],
                scores_stride,
                **sizes,
                max_windows=max_windows,
                chunk_begin=chunk_begin,
                chunk_end=chunk_end,
                num_window_tiles=num_window_tiles,
                softmax_scale_log2=softmax_scale * LOG2_E.value,
                GROUP_SIZE=num_heads // num_kv_heads,
                KERNEL_SIZE=kernel_size,
                KERNEL_STRIDE=kernel_stride,
                BLOCK_SIZE=block_size,
                HEAD_DIM=head_dim,
                PADDED_DIM=padded_dim(head_dim),
                **tiles,
            )
            padded_blocks = max(32, triton.next_power_of_2(num_blocks))
            tile_rows = max(KEYS_PER_TILE // padded_blocks, 1)
            select_topk_kernel[(triton.cdiv((chunk_end - chunk_begin) * num_kv_heads, tile_rows),)](
                scores,
                cu_seqlens,
                topk_idx,
                scores_stride,
                **sizes,
                chunk_begin=chunk_begin,
                chunk_end=chunk_end,
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
