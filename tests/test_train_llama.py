"""The Llama example: packing, the swap of the attention, a few steps. Skipped without transformers and accelerate."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
for package in ("transformers", "accelerate", "matplotlib", "tqdm"):
    pytest.importorskip(package)

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
train_llama: ModuleType = importlib.import_module("train_llama")

MODEL = ["--hidden-size", "32", "--layers", "2", "--heads", "4", "--kv-heads", "2"]
ATTENTION = ["--kernel-size", "16", "--kernel-stride", "8", "--block-size", "32", "--topk", "4", "--window-size", "40"]


def load(*options: str) -> Any:
    torch.manual_seed(0)
    return train_llama.load_model(train_llama.parse_arguments([*MODEL, *ATTENTION, *options]), vocab_size=256)


def call(model: Any, tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    position = torch.cat([torch.arange(length) for length in lengths])
    packed = {"cu_seq_lens_q": bounds, "max_length_q": max(lengths), "position_ids": position[None]}
    return model(tokens[None], **packed, use_cache=False).logits[0]


@pytest.mark.parametrize("attention", ["fsa", "dense"])
def test_packed_sequences_do_not_mix(attention: str) -> None:
    model = load("--attention", attention).eval()
    tokens = torch.randint(0, 256, (180,))
    with torch.no_grad():
        packed = call(model, tokens, [120, 60])
        torch.testing.assert_close(packed[120:], call(model, tokens[120:], [60]))
        torch.testing.assert_close(packed[:70], call(model, tokens[:70], [70]))


def test_dense_is_the_attention_of_transformers() -> None:
    model = load("--attention", "dense").eval()
    tokens = torch.randint(0, 256, (90,))
    with torch.no_grad():
        packed = call(model, tokens, [90])
        model.set_attn_implementation("eager")
        torch.testing.assert_close(packed, model(tokens[None], use_cache=False).logits[0])


def test_the_projections_of_the_llama_are_kept() -> None:
    dense, sparse = load("--attention", "dense"), load("--attention", "fsa")
    for theirs, ours in zip(dense.model.layers, sparse.model.layers, strict=True):
        attention = ours.self_attn.attention
        for name in "qkvo":
            assert torch.equal(
                getattr(attention, f"proj_{name}").weight, getattr(theirs.self_attn, f"{name}_proj").weight
            )
    rope = attention.rope.inv_freq
    torch.testing.assert_close(rope.float(), dense.model.rotary_emb.inv_freq)


def test_a_checkpoint_and_its_scaled_rope_load(tmp_path: Path) -> None:
    llama = load("--attention", "dense")
    llama.config.rope_parameters = {
        "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    llama.save_pretrained(tmp_path)
    model = load("--checkpoint", str(tmp_path))
    attention = model.model.layers[1].self_attn.attention
    assert torch.equal(attention.proj_o.weight, llama.model.layers[1].self_attn.o_proj.weight)
    torch.testing.assert_close(attention.rope.inv_freq.float(), model.model.rotary_emb.inv_freq)


def test_a_batch_without_packing_and_a_cache() -> None:
    model = load().eval()
    tokens = torch.randint(0, 256, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits[1], call(model, tokens[1], [50]))
        with pytest.raises(ValueError, match="use_cache must be False"):
            model(tokens, use_cache=True)


@pytest.mark.parametrize("options", [[], ["--attention", "dense", "--no-gradient-checkpointing"]])
def test_a_few_steps_lower_the_loss(tmp_path: Path, options: list[str]) -> None:
    losses = train_llama.main(
        [*MODEL, *ATTENTION, *options, "--steps", "12", "--tokens", "256", "--context", "128", "--lr", "2e-2"]
        + ["--out", str(tmp_path), "--save", str(tmp_path / "weights")]
    )
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.2
    assert list(tmp_path.glob("*.png")) and list((tmp_path / "weights").iterdir())


def test_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt").write_text("c")
    documents = train_llama.load_documents([tmp_path, tmp_path / "a.txt"], None)
    assert [document.tolist() for document in documents] == [[0, 97, 98, 0], [0, 99, 0], [0, 97, 98, 0]]
    with pytest.raises(FileNotFoundError, match="no file in"):
        train_llama.load_documents([tmp_path / "nowhere"], None)
