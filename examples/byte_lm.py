"""Trains a small byte-level language model with Native Sparse Attention on real text, in about two minutes.

    python examples/byte_lm.py

The text is the source of Python's own standard library, split by file into training and held-out text. Runs on the GPU
if there is one, else on the CPU. Ends with a picture of the loss, sampled text, the held-out loss beside a byte-bigram
baseline, and how far the attention's output is from the float64 reference; on a GPU also with the time of the attention
beside that of dense attention, at the longest context.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Threads that wait must not spin: on cores that other processes want as well, a step would take many times longer.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import matplotlib
import torch
from lm_data import END, VOCAB_SIZE, Batch, Bigram, Corpus, draw_batch, load_corpus
from lm_model import Config, LanguageModel, Layout
from muon import Muon
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import fsa
from fsa.module.packed import packed_rows
from fsa.module.rope import rotate

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


@dataclass(frozen=True)
class Run:
    """Sizes of a training run, fit for its device."""

    model: Config
    tokens_per_step: int
    seconds: float
    held_out_batches: int
    sampled_bytes: int


CPU_RUN = Run(
    Config(
        VOCAB_SIZE, dim=128, num_layers=2, num_heads=4, num_kv_heads=1, context=512, kernel_size=16, kernel_stride=8,
        block_size=32, topk=4, window_size=64,
    ),
    tokens_per_step=2048,
    seconds=85,
    held_out_batches=24,
    sampled_bytes=400,
)  # fmt: skip
GPU_RUN = Run(
    Config(
        VOCAB_SIZE, dim=512, num_layers=8, num_heads=8, num_kv_heads=2, context=65536, kernel_size=32, kernel_stride=16,
        block_size=64, topk=16, window_size=512,
    ),
    tokens_per_step=65536,
    seconds=60,
    held_out_batches=8,
    sampled_bytes=600,
)  # fmt: skip
_WARM_UP_STEPS = 20
_EVALUATIONS = 8  # of the held-out loss while training
_EVALUATED_BATCHES = 4  # in each of them
_TIMED_STEPS = 7


class Trainer:
    """The model, its optimizers and its losses on one device."""

    def __init__(self, run: Run, device: torch.device) -> None:
        """Initialises the model; Muon trains the matrices of the layers, AdamW everything else."""
        self.run, self.device = run, device
        self.model = LanguageModel(run.model).to(device)
        matrices = [parameter for parameter in self.model.layers.parameters() if parameter.dim() == 2]
        others = [parameter for parameter in self.model.parameters() if all(parameter is not m for m in matrices)]
        self._optimizers = [
            Muon(matrices, lr=0.03, momentum=0.95, weight_decay=0.1),
            torch.optim.AdamW(others, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self._peak_rates = [optimizer.param_groups[0]["lr"] for optimizer in self._optimizers]

    def layout(self, lengths: list[int]) -> Layout:
        """The layout of whole documents."""
        return Layout.of(lengths, self.device)

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
    axis.set_title("Byte-level language model with Native Sparse Attention")
    axis.grid(alpha=0.25)
    axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@torch.no_grad()
def sample(trainer: Trainer, prompt: Tensor, length: int, temperature: float = 0.7) -> Iterator[int]:
    """Continues a prompt, byte by byte, until a file ends or `length` bytes are drawn.

    The module keeps no keys from call to call: every byte is a pass over all bytes before it.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = prompt.long()
    for _ in range(length):
        with trainer.autocast():
            logits = trainer.model(tokens.to(trainer.device), trainer.layout([len(tokens)]))[-1]
        drawn = torch.multinomial((logits.float().cpu() / temperature).softmax(-1), 1, generator=generator)
        if drawn.item() == END:
            return
        yield int(drawn)
        tokens = torch.cat([tokens, drawn])


def project(trainer: Trainer, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the first layer's attention makes of tokens [tokens]: q, k, v before RoPE, and the gates."""
    layer = trainer.model.layers[0]
    with torch.no_grad(), trainer.autocast():
        x = layer.attention_norm(trainer.model.embedding(tokens.to(trainer.device)))
        heads = (
            projection(x).unflatten(-1, (-1, trainer.run.model.head_dim))
            for projection in (layer.attention.proj_q, layer.attention.proj_k, layer.attention.proj_v)
        )
        return *heads, layer.attention.gate(x)


@dataclass(frozen=True)
class AttentionReport:
    """What the first layer's attention does with held-out text."""

    compressed: float  # compressed keys that a query attends to, on average
    selected: float  # keys of selected blocks
    window: float  # keys of the sliding window
    visible: float  # keys that it could see
    error: float  # of its output against float64, relative


@torch.no_grad()
def inspect_attention(trainer: Trainer, batch: Batch, tokens: int = 2048) -> AttentionReport:
    """Looks at the first layer of the trained model: how sparse it is and, for the first `tokens`, how exact."""
    config = trainer.run.model
    position = torch.cat([torch.arange(length) for length in batch.lengths])
    windows = (position + 1 - config.kernel_size).div(config.kernel_stride, rounding_mode="floor") + 1
    # All slots are used as soon as there are enough blocks, and the token's own block is always among them.
    whole_blocks = (position // config.block_size).clamp(max=config.topk - 1)
    selected = whole_blocks * config.block_size + position % config.block_size + 1

    # The first tokens alone: whatever a query attends to lies before it.
    attention = trainer.model.layers[0].attention
    inputs = project(trainer, batch.inputs[:tokens])
    cu_seqlens = trainer.layout(batch.lengths).cu_seqlens.clamp(max=tokens)
    with trainer.autocast():
        out = attention.attend(*inputs, cu_seqlens)
    exact_attention = copy.deepcopy(attention).cpu().double()
    exact_attention.backend = "reference"
    exact = exact_attention.attend(*(tensor.cpu().double() for tensor in inputs), cu_seqlens.cpu())
    return AttentionReport(
        compressed=windows.clamp(min=0).double().mean().item(),
        selected=selected.double().mean().item(),
        window=(position + 1).clamp(max=config.window_size).double().mean().item(),
        visible=(position + 1).double().mean().item(),
        error=((out.cpu().double() - exact).norm() / exact.norm()).item(),
    )


def step_ms(trainer: Trainer, call: Callable[[], Tensor], leaves: list[Tensor]) -> float:
    """Median GPU time of a forward of `call` and its backward to `leaves`."""
    times = []
    for _ in range(_TIMED_STEPS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        with trainer.autocast():
            out = call()
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])  # the first ones compile and load kernels


def compare_with_dense(trainer: Trainer, files: list[Tensor]) -> tuple[float, float]:
    """Milliseconds of the first layer's attention, forward and backward, and of dense attention in its place.

    From projected q, k and v of one document of the longest context to the attention's output, RoPE included. Dense is
    PyTorch's scaled_dot_product_attention, with the kernel that PyTorch chooses.
    """
    tokens = torch.cat(files)[: trainer.run.model.context].long()
    layout = trainer.layout([len(tokens)])
    attention = trainer.model.layers[0].attention
    leaves = [tensor.requires_grad_() for tensor in project(trainer, tokens)]
    q, k, v, gates = leaves
    cosine, sine = attention.rope(packed_rows(layout.cu_seqlens, len(tokens)).position, q.dtype)

    def dense() -> Tensor:
        heads = (x.transpose(0, 1)[None] for x in (rotate(q, cosine, sine), rotate(k, cosine, sine), v))
        return functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)

    def sparse() -> Tensor:
        return attention.attend(q, k, v, gates, layout.cu_seqlens, layout.max_seqlen)

    compression = [attention.compress_key, attention.compress_value, attention.intra_block_pe]
    return step_ms(trainer, sparse, [*leaves, *compression]), step_ms(trainer, dense, leaves[:3])


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
        f"windows of {config.kernel_size} every {config.kernel_stride}, top {config.topk} blocks of "
        f"{config.block_size} keys, sliding window {config.window_size}"
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
    drawn = bytes(sample(trainer, prompt, length=run.sampled_bytes))
    text = (bytes(prompt[1:].tolist()) + drawn).decode(errors="replace")
    print("\nsample:", *(f"    {line}" for line in text.splitlines()), sep="\n")

    report = inspect_attention(trainer, held_out[0])
    verdict = "beats" if loss < bigram else "does NOT beat"
    print(
        f"\nloss curve: {picture}\n"
        f"sparsity:   of the {report.visible:.0f} keys before it a query attends, on average, to "
        f"{report.selected:.0f} in selected blocks and {report.window:.0f} in its window, and to "
        f"{report.compressed:.0f} compressed ones"
    )
    if device.type == "cuda":
        sparse_ms, dense_ms = compare_with_dense(trainer, corpus.held_out)
        print(
            f"speed:      attention of a layer, {run.model.context} tokens, forward and backward: {sparse_ms:.1f} ms, "
            f"dense attention {dense_ms:.1f} ms"
        )
    print(
        f"backend:    selected attention runs on {fsa.info().auto[device.type]}, on {device.type}; the module's output "
        f"is {report.error:.1e} from the float64 reference (relative)\n"
        f"held out:   {loss:.3f} bits/byte ({loss * math.log(2):.3f} nats), {verdict} the bigram's {bigram:.3f} "
        f"({bigram * math.log(2):.3f} nats)"
    )


if __name__ == "__main__":
    main()
