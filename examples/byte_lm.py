"""Trains a small byte-level language model whose attention is selected attention, on real text, in about two minutes.

    python examples/byte_lm.py

The text is the source of Python's own standard library, split by file into training and held-out text. Runs on the GPU
if there is one, else on the CPU. Ends with a picture of the loss, sampled text, the held-out loss beside a byte-bigram
baseline, and how far the attention's output is from the float64 reference.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Threads that wait must not spin: on cores that other processes want as well, a step would take many times longer.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import matplotlib
import torch
from lm_data import END, VOCAB_SIZE, Batch, Bigram, Corpus, draw_batch, load_corpus
from lm_model import Cache, Config, LanguageModel, Layer, Layout, select_blocks
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import fsa

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


@dataclass(frozen=True)
class Run:
    """Sizes of a training run, fit for its device."""

    model: Config
    tokens_per_step: int
    seconds: float
    held_out_batches: int


CPU_RUN = Run(
    Config(VOCAB_SIZE, dim=128, num_layers=2, num_heads=4, num_kv_heads=1, context=512, block_size=32, topk=4),
    tokens_per_step=2048,
    seconds=85,
    held_out_batches=24,
)
GPU_RUN = Run(
    Config(VOCAB_SIZE, dim=512, num_layers=8, num_heads=8, num_kv_heads=2, context=8192, block_size=64, topk=16),
    tokens_per_step=32768,
    seconds=60,
    held_out_batches=16,
)
_WARM_UP_STEPS = 20
_EVALUATIONS = 8  # of the held-out loss while training
_EVALUATED_BATCHES = 4  # in each of them


class Trainer:
    """The model, its optimizers and its losses on one device."""

    def __init__(self, run: Run, device: torch.device) -> None:
        """Initialises the model; Muon trains the matrices of the layers, AdamW everything else."""
        self.run, self.device = run, device
        self.model = LanguageModel(run.model).to(device)
        matrices = [parameter for parameter in self.model.layers.parameters() if parameter.dim() == 2]
        others = [parameter for parameter in self.model.parameters() if all(parameter is not m for m in matrices)]
        self._optimizers = [
            torch.optim.Muon(matrices, lr=0.03, momentum=0.95, weight_decay=0.1),
            torch.optim.AdamW(others, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self._peak_rates = [optimizer.param_groups[0]["lr"] for optimizer in self._optimizers]

    def layout(self, lengths: list[int]) -> Layout:
        """The layout of whole documents."""
        return Layout.of(lengths, lengths, self.run.model.block_size, self.device)

    def autocast(self) -> torch.autocast:
        """bf16 on a GPU, fp32 on the CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a batch, in nats."""
        with self.autocast():
            logits = self.model(batch.inputs.to(self.device), self.layout(batch.lengths))
        return functional.cross_entropy(logits.float(), batch.targets.to(self.device))

    def step(self, batch: Batch, rate: float) -> float:
        """One update with `rate` times the peak learning rates; returns the loss before it, in bits per byte."""
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, peak in zip(self._optimizers, self._peak_rates, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad()
        return loss.item() / math.log(2)

    @torch.no_grad()
    def bits_per_byte(self, batches: list[Batch]) -> float:
        """Mean loss over batches of equal size."""
        return sum(self.loss(batch).item() for batch in batches) / len(batches) / math.log(2)


@dataclass(frozen=True)
class Curve:
    """Losses in bits per byte along the way: (bytes seen, loss)."""

    train: list[tuple[int, float]]
    held_out: list[tuple[int, float]]


def train(trainer: Trainer, files: list[Tensor], held_out: list[Batch], seconds: float) -> Curve:
    """Trains for a while; the learning rate follows the clock, so that it has decayed when the time is up."""
    run, rng, curve = trainer.run, random.Random(0), Curve([], [])
    start, evaluations = time.monotonic(), 0
    with tqdm(total=round(seconds), bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s {postfix}") as progress:
        while (elapsed := time.monotonic() - start) < seconds:
            done = elapsed / seconds
            batch = draw_batch(files, run.tokens_per_step, run.model.context, rng)
            steps = len(curve.train) + 1
            rate = min(1.0, steps / _WARM_UP_STEPS, 2 * (1 - done))
            curve.train.append((steps * run.tokens_per_step, trainer.step(batch, rate)))
            if done * _EVALUATIONS >= evaluations:
                curve.held_out.append((steps * run.tokens_per_step, trainer.bits_per_byte(held_out)))
                evaluations += 1
            progress.set_postfix_str(
                f"step {steps}, {curve.train[-1][1]:.2f} bits/byte, held out {curve.held_out[-1][1]:.2f}"
            )
            progress.update(min(time.monotonic() - start, progress.total) - progress.n)
    return curve


def plot_curve(curve: Curve, bigram: float, path: Path) -> None:
    """Draws the losses over the bytes seen."""
    figure, axis = pyplot.subplots(figsize=(8, 4.5))
    axis.plot(*zip(*curve.train, strict=True), color="#b5cde0", linewidth=0.8, label="training")
    axis.plot(*zip(*curve.held_out, strict=True), color="#1f5c99", marker="o", label="held out")
    axis.axhline(bigram, color="#c0392b", linestyle="--", label="bigram, held out")
    axis.set(xlabel="bytes of training text", ylabel="bits per byte", ylim=(0, 8.2))
    axis.set_title("Byte-level language model with selected attention")
    axis.grid(alpha=0.25)
    axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@torch.no_grad()
def sample(trainer: Trainer, prompt: Tensor, length: int, temperature: float = 0.7) -> Iterator[int]:
    """Continues a prompt, byte by byte, until a file ends or `length` bytes are drawn.

    The prompt goes through the model once; after that each new byte is one query over the keys of all bytes before it.
    """
    model, device = trainer.model, trainer.device
    generator = torch.Generator().manual_seed(0)
    cache = Cache(len(model.layers))
    tokens, total = prompt.long(), 0
    for _ in range(length):
        total += len(tokens)
        layout = Layout.of([len(tokens)], [total], trainer.run.model.block_size, device)
        with trainer.autocast():
            logits = model(tokens.to(device), layout, cache)[-1]
        tokens = torch.multinomial((logits.float().cpu() / temperature).softmax(-1), 1, generator=generator)
        if tokens.item() == END:
            return
        yield int(tokens)


@dataclass(frozen=True)
class AttentionReport:
    """What the first layer's attention does with held-out text."""

    attended: float  # keys that a query attends to, on average
    visible: float  # keys that it could see
    error: float  # of its output against float64, relative


@torch.no_grad()
def inspect_attention(trainer: Trainer, batch: Batch, tokens: int = 2048) -> AttentionReport:
    """Looks at the first layer of the trained model: how sparse it is and, for the first `tokens`, how exact."""
    config, layer, layout = trainer.run.model, trainer.model.layers[0], trainer.layout(batch.lengths)
    assert isinstance(layer, Layer)
    with trainer.autocast():
        x = layer.attention_norm(trainer.model.embedding(batch.inputs.to(trainer.device)))
        q, k, v = layer.attention.project(x, layout)
        topk_idx = select_blocks(q, k, layout, config.topk)
    seen = layout.position[:, None] + 1
    attended = (seen - topk_idx * config.block_size).clamp(0, config.block_size).masked_fill(topk_idx < 0, 0)

    # The first tokens alone: whatever a query attends to lies before it.
    q, k, v, topk_idx = q[:tokens], k[:tokens], v[:tokens], topk_idx[:, :tokens]
    cu_seqlens = layout.cu_seqlens_q.clamp(max=tokens)
    out = fsa.selected_attention(q, k, v, topk_idx, cu_seqlens, block_size=config.block_size)
    q, k, v = (tensor.double().cpu() for tensor in (q, k, v))
    exact = fsa.selected_attention(
        q, k, v, topk_idx.cpu(), cu_seqlens.cpu(), block_size=config.block_size, backend="reference"
    )
    error = (out.double().cpu() - exact).norm() / exact.norm()
    return AttentionReport(attended.sum(-1).float().mean().item(), seen.float().mean().item(), error.item())


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="of training; default 60 on a GPU, 85 without")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "output", help="folder of the picture; default %(default)s"
    )
    return parser.parse_args()


def describe(run: Run, corpus: Corpus, trainer: Trainer) -> str:
    """What is about to be trained, on what."""
    config = run.model
    megabytes = [sum(len(file) for file in files) / 1e6 for files in (corpus.train, corpus.held_out)]
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6
    return (
        f"text:  Python's standard library, {len(corpus.train)} files ({megabytes[0]:.1f} MB) to train on, "
        f"{len(corpus.held_out)} held out ({megabytes[1]:.1f} MB)\n"
        f"model: {parameters:.1f} M parameters, {config.num_layers} layers, {config.num_heads} query heads on "
        f"{config.num_kv_heads} KV, documents of up to {config.context} bytes, "
        f"top {config.topk} blocks of {config.block_size} keys"
    )


def main() -> None:
    """Trains, then reports."""
    options = parse_arguments()
    device = torch.device(options.device)
    run = GPU_RUN if device.type == "cuda" else CPU_RUN
    torch.manual_seed(0)
    trainer = Trainer(run, device)
    corpus = load_corpus()
    print(describe(run, corpus, trainer))

    rng = random.Random(1)
    held_out = [
        draw_batch(corpus.held_out, run.tokens_per_step, run.model.context, rng) for _ in range(run.held_out_batches)
    ]
    bigram = Bigram(corpus.train).bits_per_byte(held_out)
    curve = train(trainer, corpus.train, held_out[:_EVALUATED_BATCHES], options.seconds or run.seconds)
    loss = trainer.bits_per_byte(held_out)
    picture = options.out / "byte_lm_loss.png"
    plot_curve(curve, bigram, picture)

    prompt = torch.tensor(list(b"\0import os\n\n\ndef "), dtype=torch.uint8)
    drawn = bytes(sample(trainer, prompt, length=min(1000, run.model.context - len(prompt))))
    text = (bytes(prompt[1:].tolist()) + drawn).decode(errors="replace")
    print("\nsample:", *(f"    {line}" for line in text.splitlines()), sep="\n")

    report = inspect_attention(trainer, held_out[0])
    verdict = "beats" if loss < bigram else "does NOT beat"
    print(
        f"\nloss curve: {picture}\n"
        f"sparsity:   a query attends to {report.attended:.0f} of the {report.visible:.0f} keys before it, on average\n"
        f"backend:    {fsa.info().auto[device.type]} on {device.type}; its output is {report.error:.1e} from the "
        f"float64 reference (relative)\n"
        f"held out:   {loss:.3f} bits/byte ({loss * math.log(2):.3f} nats), {verdict} the bigram's {bigram:.3f} "
        f"({bigram * math.log(2):.3f} nats)"
    )


if __name__ == "__main__":
    main()
