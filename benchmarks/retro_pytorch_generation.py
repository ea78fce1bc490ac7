"""How fast does retro-pytorch generate? Run by benchmarks/generation.py with the interpreter of .venv-peers.

Its own `generate` runs, on its own model with the sizes it takes: it has no setting that reaches
the number of heads, which is 8. Neighbours are random chunks that come at no cost, where it would
embed and search.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from retro_pytorch import RETRO  # pyright: ignore[reportMissingImports]
from retro_pytorch.training import TrainingWrapper  # pyright: ignore[reportMissingImports]


def wrapper_of(model: torch.nn.Module, chunk_length: int, num_neighbours: int, vocab_size: int) -> TrainingWrapper:
    """What its `generate` needs of a TrainingWrapper, without the training data that one is made from."""
    wrapper = TrainingWrapper.__new__(TrainingWrapper)
    torch.nn.Module.__init__(wrapper)
    wrapper.retro = model
    wrapper.chunk_size = chunk_length
    wrapper.max_seq_len = model.seq_len
    wrapper.fetch_knn_chunks_fn = lambda chunks: torch.randint(
        1000, vocab_size, (len(chunks), num_neighbours, 2 * chunk_length)
    )
    return wrapper


def main() -> None:
    """Print tokens per second, in float32 and under bf16 autocast, as one JSON object."""
    parser = argparse.ArgumentParser()
    for name in ("vocab-size", "dim", "layers", "chunk-length", "neighbours", "context", "tokens", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--cca-layers", type=int, nargs="+", required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = RETRO(
        num_tokens=args.vocab_size,
        max_seq_len=args.context,
        enc_dim=args.dim,
        dec_dim=args.dim,
        enc_depth=2,
        dec_depth=args.layers,
        enc_cross_attn_layers=(1,),
        dec_cross_attn_layers=tuple(args.cca_layers),
        chunk_size=args.chunk_length,
    ).eval()
    wrapper = wrapper_of(model, args.chunk_length, args.neighbours, args.vocab_size)
    start = torch.randint(1000, args.vocab_size, (1, args.context + 1 - args.tokens))
    tokens_per_s = {}
    for name, bf16 in (("fp32", False), ("bf16", True)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            wrapper.retro(start, retrieved=None)
            began = time.perf_counter()
            text = wrapper.generate(start, filter_thres=0.9, temperature=1.0)
            seconds = time.perf_counter() - began
        tokens_per_s[name] = (text.shape[1] - start.shape[1]) / seconds
    num_weights = sum(weight.numel() for weight in model.parameters())
    print(json.dumps({"tokens_per_s": tokens_per_s, "num_weights": num_weights}))


if __name__ == "__main__":
    main()
