"""The example's parts: the corpus split, the packing, the model, training, sampling and the report."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fsa.module.compressed_attention import compressed_attention
from fsa.module.compression import find_windows
from fsa.module.selection import select_blocks

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

pytest.importorskip("matplotlib")

lm_data: ModuleType = importlib.import_module("lm_data")
lm_model: ModuleType = importlib.import_module("lm_model")
byte_lm: ModuleType = importlib.import_module("byte_lm")
muon: ModuleType = importlib.import_module("muon")

CPU = torch.device("cpu")
CONFIG = lm_model.Config(
    vocab_size=256, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, context=256, kernel_size=16, kernel_stride=8,
    block_size=32, topk=4, window_size=40,
)  # fmt: skip


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


def test_no_byte_sees_what_comes_after_it(model: Any) -> None:
    torch.manual_seed(1)
    tokens = torch.randint(0, 256, (200,))
    layout = lm_model.Layout.of([200], CPU)
    changed = tokens.clone()
    changed[150:] = 7
    torch.testing.assert_close(model(tokens, layout)[:150], model(changed, layout)[:150])


def test_packed_documents_do_not_mix(model: Any) -> None:
    tokens = torch.randint(0, 256, (180,))
    packed = model(tokens, lm_model.Layout.of([120, 60], CPU))
    alone = model(tokens[120:], lm_model.Layout.of([60], CPU))
    torch.testing.assert_close(packed[120:], alone)


@pytest.fixture
def trainer() -> Any:
    torch.manual_seed(0)
    run = byte_lm.Run(CONFIG, tokens_per_step=512, seconds=1, held_out_batches=2, sampled_bytes=5)
    return byte_lm.Trainer(run, CPU)


def test_a_step_lowers_the_loss_and_trains_every_parameter(corpus: Any, trainer: Any) -> None:
    batch = lm_data.draw_batch(corpus.train, tokens=512, context=256, rng=random.Random(0))
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    losses = [trainer.step(batch, rate=0.5) for _ in range(4)]
    assert losses[0] == pytest.approx(8, abs=0.3)  # bits of a byte of which nothing is known
    assert losses[-1] < losses[0] - 0.5
    assert not any(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())


def test_sampling_is_repeatable(trainer: Any) -> None:
    prompt = torch.tensor(list(b"import "), dtype=torch.uint8)
    first, again = (list(byte_lm.sample(trainer, prompt, length=5)) for _ in range(2))
    assert first == again and len(first) <= 5


def test_the_report_counts_what_the_attention_reads(corpus: Any, trainer: Any) -> None:
    batch = lm_data.draw_batch(corpus.held_out, tokens=512, context=256, rng=random.Random(0))
    report = byte_lm.inspect_attention(trainer, batch)
    assert report.error < 1e-5
    layout = trainer.layout(batch.lengths)
    total = len(batch.inputs)
    windows = find_windows(layout.cu_seqlens, total, CONFIG.kernel_size, CONFIG.kernel_stride)
    q, k, v, _ = byte_lm.project(trainer, batch.inputs)
    compressed_k, compressed_v = trainer.model.layers[0].attention.compress(k, v, windows)
    sizes = {"kernel_size": CONFIG.kernel_size, "kernel_stride": CONFIG.kernel_stride}
    sequences = (layout.cu_seqlens, windows.cu_seqlens)
    # All scores equal: the log of the sum counts the windows seen.
    _, lse = compressed_attention(0 * q, compressed_k, compressed_v, *sequences, **sizes)
    topk_idx = select_blocks(
        q, compressed_k, lse, *sequences, **sizes, block_size=32, topk=4, init_blocks=1, local_blocks=2
    )
    position = torch.cat([torch.arange(length) for length in batch.lengths])
    keys = (position[:, None] + 1 - 32 * topk_idx).clamp(0, 32).masked_fill(topk_idx < 0, 0)
    assert report.compressed == pytest.approx(lse.exp().mean().item(), rel=1e-5)
    assert report.selected == pytest.approx(keys.sum(-1).double().mean().item())


@pytest.mark.gpu
def test_the_comparison_with_dense_attention_runs(corpus: Any) -> None:
    device = torch.device("cuda")
    trainer = byte_lm.Trainer(byte_lm.Run(CONFIG, 512, 1, 2, 5), device)
    assert min(byte_lm.compare_with_dense(trainer, corpus.held_out)) > 0


@pytest.mark.parametrize("shape", [(48, 16), (16, 48)])
def test_muon_is_that_of_torch(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    options = {"lr": 0.03, "momentum": 0.95, "weight_decay": 0.1}
    optimizers = [muon.Muon([ours], **options), torch.optim.Muon([theirs], **options)]
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)  # theirs in bf16; a step moves them by 0.03
