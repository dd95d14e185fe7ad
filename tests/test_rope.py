"""Rotary position embedding."""

from __future__ import annotations

from typing import Any

import nsa_reference
import pytest
import torch
from module_inputs import randn
from torch import Tensor

from fsa.module.rope import RopeConfig, RotaryEmbedding, rotate

LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("scaling", [None, LLAMA3 | {"rope_type": "llama3"}, LLAMA3 | {"type": "llama3"}])
def test_rope(scaling: dict[str, Any] | None) -> None:
    config = RopeConfig(head_dim=64, rope_scaling=scaling)
    position = torch.tensor([0, 1, 77, 8191, 131071, 3_000_000])
    x = randn(6, 3, 64)
    angle = nsa_reference.angles(position, config.rope_theta, 64, LLAMA3 if scaling else None)
    wanted = nsa_reference.rotated(x, angle)
    rope = RotaryEmbedding(config)
    torch.testing.assert_close(rotate(x, *rope(position, torch.float64)), wanted, rtol=1e-9, atol=1e-9)
    actual = rotate(x.bfloat16(), *rope.bfloat16()(position, torch.bfloat16))
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-2, atol=3e-2)
    assert actual.dtype == torch.bfloat16


def test_rope_keeps_relative_positions() -> None:
    rope, q, k = RotaryEmbedding(RopeConfig(head_dim=16)), randn(1, 1, 16), randn(1, 1, 16, seed=1)

    def product(i: int, j: int) -> Tensor:
        return (rotate(q, *rope(torch.tensor([i]), q.dtype)) * rotate(k, *rope(torch.tensor([j]), q.dtype))).sum()

    torch.testing.assert_close(product(12, 5), product(100_012, 100_005), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rope_type", ["default", "llama3"])
def test_frequencies_are_those_of_transformers(rope_type: str) -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = None if rope_type == "default" else LLAMA3 | {"rope_type": "llama3"}
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=256, num_attention_heads=2, rope_theta=500000.0, rope_scaling=scaling)
    )
    ours = RotaryEmbedding(RopeConfig(head_dim=128, rope_theta=500000.0, rope_scaling=scaling))
    torch.testing.assert_close(ours.inv_freq.float(), theirs.inv_freq.float(), rtol=1e-5, atol=0)
