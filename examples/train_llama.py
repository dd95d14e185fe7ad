"""Trains a Hugging Face Llama whose attention is the NSA module, on packed sequences of local text.

    python examples/train_llama.py --hidden-size 1024 --layers 12 --heads 16 --kv-heads 4
    python examples/train_llama.py --checkpoint FOLDER --tokenizer FOLDER --data FOLDER
    accelerate launch examples/train_llama.py --attention dense        # or torchrun, for several GPUs

Needs `pip install ".[train]"` (transformers, accelerate). Without --checkpoint the weights are random, without
--tokenizer a token is a byte, without --data the text is the source of Python's standard library. Of a checkpoint
everything is kept: proj_q, proj_k, proj_v and proj_o of the module are the q_proj, k_proj, v_proj and o_proj of the
Llama, and its rotary embedding is that of the Llama's configuration. compress_key, compress_value, intra_block_pe and
gate are new and start at random, so the model has to be trained on before it is worth anything.

Ends with a picture of the loss. The module keeps no keys from call to call, so `generate` needs use_cache=False.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # on the CPU: threads that wait do not spin

import matplotlib
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from lm_data import VOCAB_SIZE, draw_batch, load_corpus, read_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import AttentionInterface, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fsa import FlashSparseAttention, RopeConfig
from fsa.module.packed import packed_rows
from fsa.module.sliding_window import sliding_window_attention

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

_WARM_UP_STEPS = 20
_DENSE = "packed_dense"


class SparseLlamaAttention(nn.Module):
    """The module in place of a `LlamaAttention`, with its projections."""

    def __init__(self, config: LlamaConfig, dense: nn.Module, sizes: dict[str, int]) -> None:
        """sizes: kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks and window_size.

        Raises:
            ValueError: the Llama's projections have biases, which the module's have not.
        """
        super().__init__()
        if config.attention_bias:
            raise ValueError("attention_bias of the configuration must be False, got True; the module has no biases")
        rope = dict(config.rope_parameters)
        self.attention = FlashSparseAttention(
            hidden_size=config.hidden_size,
            num_q_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rope_config=RopeConfig(head_dim=config.head_dim, rope_theta=rope.pop("rope_theta"), rope_scaling=rope),
            **sizes,
        ).to(dense.q_proj.weight)
        for ours, theirs in (("proj_q", "q_proj"), ("proj_k", "k_proj"), ("proj_v", "v_proj"), ("proj_o", "o_proj")):
            getattr(self.attention, ours).weight = getattr(dense, theirs).weight

    def forward(
        self,
        hidden_states: Tensor,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        cache: object = None,
        past_key_values: object = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """hidden_states is [batch, tokens, hidden_size]; transformers hands on what the model is called with.

        Without cu_seq_lens_q every row of the batch is a sequence.
        """
        if cache is not None or past_key_values is not None:
            raise ValueError("use_cache must be False, got a cache; the module keeps no keys from call to call")
        batch, tokens, _hidden_size = hidden_states.shape
        if cu_seq_lens_q is None:
            cu_seq_lens_q = torch.arange(batch + 1, dtype=torch.int32, device=hidden_states.device) * tokens
            max_length_q = tokens
        out = self.attention(hidden_states.flatten(0, 1), cu_seq_lens_q, max_length_q)
        return out.unflatten(0, (batch, tokens)), None


def replace_attention(model: LlamaForCausalLM, sizes: dict[str, int]) -> None:
    """Puts the module into every layer; sizes as in `SparseLlamaAttention`."""
    model.config.use_cache = False
    for layer in model.model.layers:
        layer.self_attn = SparseLlamaAttention(model.config, layer.self_attn, sizes)


def packed_dense_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention within packed sequences, as transformers calls it: q, k, v are [1, heads, tokens, head_dim].

    A sliding window as long as the longest sequence: on a GPU torch's variable-length attention.
    """
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # RoPE may have made them fp32
    out = sliding_window_attention(
        q, k, v, cu_seq_lens_q, window_size=max_length_q, max_seqlen=max_length_q, softmax_scale=scaling
    )
    return out[None], None


AttentionInterface.register(_DENSE, packed_dense_attention)


def load_model(options: argparse.Namespace, vocab_size: int) -> LlamaForCausalLM:
    """The Llama of the command line, in fp32, with the attention that was asked for."""
    if options.checkpoint:
        model = LlamaForCausalLM.from_pretrained(options.checkpoint, attn_implementation=_DENSE).float()
    else:
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=options.hidden_size,
            intermediate_size=-(-8 * options.hidden_size // 3 // 64) * 64,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.kv_heads,
            max_position_embeddings=options.context,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            attn_implementation=_DENSE,
        )
        model = LlamaForCausalLM(config)
    if options.attention == "fsa":
        names = "kernel_size", "kernel_stride", "block_size", "topk", "init_blocks", "local_blocks", "window_size"
        replace_attention(model, {name: getattr(options, name) for name in names})
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def load_documents(paths: Sequence[Path], tokenizer: Any | None) -> list[Tensor]:
    """Every file as a tensor of token ids; files of folders at any depth.

    Raises:
        FileNotFoundError: there is no file.
    """
    if paths:
        found = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
        documents = [read_file(file) for file in found if file.is_file()]
    else:
        documents = load_corpus().train
    if not documents:
        raise FileNotFoundError(f"no file in {', '.join(map(str, paths))}; pass files or folders of text")
    if tokenizer is None:
        return documents
    texts = (bytes(document[1:-1].tolist()).decode(errors="replace") for document in documents)
    return [torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id]) for text in texts]


def train(options: argparse.Namespace, accelerator: Accelerator) -> list[float]:
    """Trains; returns the loss of every step, in nats a token, the mean over all processes."""
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else None
    documents = load_documents(options.data, tokenizer)
    model = load_model(options, vocab_size=VOCAB_SIZE if tokenizer is None else len(tokenizer))
    accelerator.print(
        f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters, {options.attention} "
        f"attention; {sum(map(len, documents)) / 1e6:.1f} M tokens in {len(documents)} documents; processes: "
        f"{accelerator.num_processes}, each {options.tokens} tokens a step in sequences of up to {options.context}"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / _WARM_UP_STEPS, 1.0, 2 * (1 - step / options.steps))
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    rng = random.Random(accelerator.process_index)
    losses: list[float] = []
    last = time.monotonic()
    progress = tqdm(range(options.steps), unit="step", disable=not accelerator.is_main_process)
    for _ in progress:
        batch = draw_batch(documents, options.tokens, options.context, rng)
        bounds = functional.pad(torch.tensor(batch.lengths).cumsum(0), (1, 0))
        cu_seqlens = bounds.int().to(accelerator.device)
        logits = model(
            batch.inputs[None].to(accelerator.device),
            position_ids=packed_rows(cu_seqlens, options.tokens).position[None],
            cu_seq_lens_q=cu_seqlens,
            max_length_q=max(batch.lengths),
            use_cache=False,
        ).logits[0]
        loss = functional.cross_entropy(logits.float(), batch.targets.to(accelerator.device))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        now = time.monotonic()
        rate = options.tokens * accelerator.num_processes / (now - last)
        progress.set_postfix_str(f"loss {losses[-1]:.3f}, {rate:,.0f} tokens/s")
        last = now
    if options.save:
        accelerator.save_model(model, options.save)
    return losses


def plot_losses(losses: Sequence[float], options: argparse.Namespace) -> Path:
    """Draws the loss over the steps; returns the picture's path."""
    figure, axis = pyplot.subplots(figsize=(8, 4.5))
    axis.plot(range(1, len(losses) + 1), losses, color="#1f5c99", linewidth=1)
    axis.set(xlabel="step", ylabel="loss, nats a token", title=f"Llama with {options.attention} attention")
    axis.grid(alpha=0.25)
    figure.tight_layout()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"train_llama_{options.attention}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--attention", choices=("fsa", "dense"), default="fsa")
    add("--checkpoint", type=Path, help="folder of a Llama in the format of transformers; default: random weights")
    add("--tokenizer", type=Path, help="folder of its tokenizer; default: a token is a byte")
    add("--data", type=Path, nargs="+", default=[], help="text files or folders; default: Python's standard library")
    add("--steps", type=int, default=200)
    add("--tokens", type=int, default=32768, help="of a step and process; default %(default)s")
    add("--context", type=int, default=32768, help="longest sequence, in tokens; default %(default)s")
    add("--lr", type=float, default=1e-3, help="peak learning rate; default %(default)s")
    add("--precision", choices=("bf16", "no"), default="bf16", help="autocast; default %(default)s")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    add("--out", type=Path, default=Path(__file__).parent / "output", help="folder of the picture; default %(default)s")
    add("--save", type=Path, help="folder for the trained weights")
    sizes = parser.add_argument_group("the Llama, without --checkpoint")
    for name, value in {"hidden-size": 1024, "layers": 12, "heads": 16, "kv-heads": 4}.items():
        sizes.add_argument(f"--{name}", type=int, default=value, help="default %(default)s")
    sizes = parser.add_argument_group("the sparse attention")
    defaults = {"kernel-size": 32, "kernel-stride": 16, "block-size": 64, "topk": 16, "init-blocks": 1}
    for name, value in (defaults | {"local-blocks": 2, "window-size": 512}).items():
        sizes.add_argument(f"--{name}", type=int, default=value, help="default %(default)s")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Trains and draws; returns the losses."""
    options = parse_arguments(arguments)
    set_seed(0)
    accelerator = Accelerator(mixed_precision=options.precision)
    losses = train(options, accelerator)
    if accelerator.is_main_process:
        print(f"loss curve: {plot_losses(losses, options)}")
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    main()
