"""Real text that every machine has, the source of Python's standard library, as packed batches of bytes."""

from __future__ import annotations

import math
import random
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCAB_SIZE = 256
END = 0  # stands before and behind every file: no Python source contains this byte

# Third-party packages are not the standard library; the other folders hold tables and tests that repeat one another,
# so that a held-out file would not be new.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "encodings", "test", "tests", "idle_test", "pydoc_data"}
_HELD_OUT_ONE_IN = 16


@dataclass(frozen=True)
class Corpus:
    """Files as uint8 tensors, split by file: no byte of a held-out file is trained on."""

    train: list[Tensor]
    held_out: list[Tensor]


@dataclass(frozen=True)
class Batch:
    """Windows of several files, packed one behind the other."""

    inputs: Tensor  # [tokens], int64
    targets: Tensor  # [tokens], int64: the byte after each input
    lengths: list[int]  # tokens of each window


def read_file(path: Path) -> Tensor:
    """The bytes of a file as uint8, between two ENDs."""
    return torch.frombuffer(bytearray([END]) + path.read_bytes() + bytearray([END]), dtype=torch.uint8)


def load_corpus() -> Corpus:
    """Reads the standard library's source and splits it by a hash of each file's path.

    Raises:
        FileNotFoundError: this Python has no standard library source (a zipped or stripped installation).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[Tensor] = []
    held_out: list[Tensor] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(name.parts) and path.stat().st_size > 0:
            held = zlib.crc32(name.as_posix().encode()) % _HELD_OUT_ONE_IN == 0
            (held_out if held else train).append(read_file(path))
    if not train or not held_out:
        raise FileNotFoundError(f"no Python source under {root}; run the example with a Python that ships its library")
    return Corpus(train, held_out)


def draw_batch(files: list[Tensor], tokens: int, context: int, rng: random.Random) -> Batch:
    """Packs random windows of random files, at most `context` tokens each, until there are `tokens` of them.

    Every byte is about equally likely: a file is drawn in proportion to its length.
    """
    sizes = [len(file) - 1 for file in files]
    windows: list[Tensor] = []
    missing = tokens
    while missing > 0:
        file = rng.choices(range(len(files)), weights=sizes)[0]
        length = min(sizes[file], context, missing)
        start = rng.randrange(sizes[file] - length + 1)
        windows.append(files[file][start : start + length + 1].long())
        missing -= length
    return Batch(
        inputs=torch.cat([window[:-1] for window in windows]),
        targets=torch.cat([window[1:] for window in windows]),
        lengths=[len(window) - 1 for window in windows],
    )


class Bigram:
    """The baseline: how likely each byte is after the byte before it, counted on the training text."""

    def __init__(self, files: list[Tensor]) -> None:
        """Counts all pairs of neighbouring bytes, smoothed by a tenth of a count."""
        counts = torch.full((VOCAB_SIZE * VOCAB_SIZE,), 0.1, dtype=torch.float64)
        for file in files:
            pairs = file[:-1].long() * VOCAB_SIZE + file[1:].long()
            counts += torch.bincount(pairs, minlength=counts.numel())
        table = counts.view(VOCAB_SIZE, VOCAB_SIZE)
        self._nats = table.sum(1, keepdim=True).log() - table.log()

    def bits_per_byte(self, batches: list[Batch]) -> float:
        """Mean loss over all targets."""
        losses = torch.cat([self._nats[batch.inputs, batch.targets] for batch in batches])
        return losses.mean().item() / math.log(2)
