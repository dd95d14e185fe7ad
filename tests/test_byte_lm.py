"""The example's parts: the corpus split, the packing, block selection, decoding with a cache."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

lm_data: ModuleType = importlib.import_module("lm_data")
lm_model: ModuleType = importlib.import_module("lm_model")

CPU = torch.device("cpu")
CONFIG = lm_model.Config(
    vocab_size=256, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, context=256, block_size=32, topk=4
)


@pytest.fixture(scope="module")
def corpus() -> Any:
    return lm_data.load_corpus()


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return lm_model.LanguageModel(CONFIG).double()


def test_split_is_by_file(corpus: Any) -> None:
    total = sum(map(len, corpus.train)) + sum(map(len, corpus.held_out))
    assert total > 1_000_000
    assert 0.02 < sum(map(len, corpus.held_out)) / total < 0.2
    contents = {bytes(file.tolist()) for file in corpus.train if len(file) > 1000}
    assert not any(bytes(file.tolist()) in contents for file in corpus.held_out if len(file) > 1000)


def test_batches_are_packed_windows(corpus: Any) -> None:
    batch = lm_data.draw_batch(corpus.train, tokens=1000, context=300, rng=random.Random(0))
    assert sum(batch.lengths) == len(batch.inputs) == len(batch.targets) == 1000
    assert len(batch.lengths) >= 4 and max(batch.lengths) <= 300
    begin = 0
    for length in batch.lengths:
        assert torch.equal(batch.inputs[begin + 1 : begin + length], batch.targets[begin : begin + length - 1])
        begin += length


def test_bigram_counts_pairs() -> None:
    text = torch.tensor(list(b"abababac"), dtype=torch.uint8)
    bigram = lm_data.Bigram([text])
    after_a = lm_data.Batch(torch.tensor([97, 97]), torch.tensor([98, 99]), [2])
    expected = -(torch.tensor([3.1, 1.1]) / (4 + 25.6)).log2().mean()
    assert bigram.bits_per_byte([after_a]) == pytest.approx(expected.item())


def test_selection_is_causal_and_stays_in_the_document() -> None:
    lengths = [100, 1, 200]
    layout = lm_model.Layout.of(lengths, lengths, CONFIG.block_size, CPU)
    torch.manual_seed(0)
    q, k = torch.randn(301, 4, 8), torch.randn(301, 2, 8)
    topk_idx = lm_model.select_blocks(q, k, layout, CONFIG.topk)
    assert topk_idx.shape == (2, 301, 4) and topk_idx.dtype == torch.int32
    position = torch.cat([torch.arange(length) for length in lengths])
    own = position // CONFIG.block_size
    assert (topk_idx.max(-1).values == own).all()
    assert ((topk_idx >= 0).sum(-1) == (own + 1).clamp(max=CONFIG.topk)).all()
    assert all((topk_idx == block[:, None]).any(-1).all() for block in (0 * own, (own - 1).clamp(min=0)))


def test_selection_takes_the_blocks_whose_mean_key_scores_highest() -> None:
    layout = lm_model.Layout.of([192], [192], 32, CPU)
    torch.manual_seed(0)
    q, k = torch.randn(192, 2, 8), torch.randn(192, 1, 8)
    topk_idx = lm_model.select_blocks(q, k, layout, topk=4)
    means = k.unflatten(0, (6, 32)).mean(1)[:, 0]  # [blocks, head_dim]
    best = (q[170].sum(0) @ means[1:4].T).argmax() + 1  # the last query's free slot: 0, 4 and 5 are always selected
    assert sorted(topk_idx[0, 170].tolist()) == sorted([0, 4, 5, int(best)])


def test_no_byte_sees_what_comes_after_it(model: Any) -> None:
    torch.manual_seed(1)
    tokens = torch.randint(0, 256, (200,))
    layout = lm_model.Layout.of([200], [200], CONFIG.block_size, CPU)
    changed = tokens.clone()
    changed[150:] = 7
    torch.testing.assert_close(model(tokens, layout)[:150], model(changed, layout)[:150])


def test_packed_documents_do_not_mix(model: Any) -> None:
    tokens = torch.randint(0, 256, (180,))
    packed = model(tokens, lm_model.Layout.of([120, 60], [120, 60], CONFIG.block_size, CPU))
    alone = model(tokens[120:], lm_model.Layout.of([60], [60], CONFIG.block_size, CPU))
    torch.testing.assert_close(packed[120:], alone)


def test_decoding_with_a_cache_equals_the_whole_pass(model: Any) -> None:
    torch.manual_seed(2)
    tokens = torch.randint(0, 256, (150,))
    whole = model(tokens, lm_model.Layout.of([150], [150], CONFIG.block_size, CPU))
    cache = lm_model.Cache(CONFIG.num_layers)
    parts, begin = [], 0
    for length in (70, 1, 1, 50, 1, 27):
        begin += length
        layout = lm_model.Layout.of([length], [begin], CONFIG.block_size, CPU)
        parts.append(model(tokens[begin - length : begin], layout, cache))
    torch.testing.assert_close(torch.cat(parts), whole)
