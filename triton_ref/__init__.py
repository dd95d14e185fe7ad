"""Selected attention in Triton, stage by stage: the algorithm to read, and the fallback where no extension is compiled.

KV blocks are outside, queries inside. A query token lists the KV blocks it selects (`topk_idx`); turned around, each KV
block has a list of the *edges* (query token, slot) that selected it. A program keeps the keys and values of one block
and walks that list: the `group_size` query heads of a token ride together as rows of a tile.

    plan                  invert topk_idx: edges sorted by (KV head, query range, KV block), cut into work items
    forward_main          a work item: attention of its rows to this one block, a partial output and lse for each row
    forward_reduce        online softmax across the slots of a query
    backward_preprocess   delta = rowsum(dout * out) - dlse
    backward_main         a work item: dK and dV of the block, a partial dQ for each row
    backward_reduce       sum the parts: dQ over slots, dK and dV over the work items of a block

Nothing is accumulated across programs, so there are no atomics and no order that could change from run to run.
`common` holds what the stages share; `csrc/README.md` describes the buffers between them.
"""
