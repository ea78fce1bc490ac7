"""Training steps of retro-pytorch, one for every line of standard input; run by benchmarks/training.py with the
interpreter of .venv-peers.

It has no training loop: this is its model's own loss, its own optimiser, and what every loop has between them. A line
says `fp32`, which is how it comes, or `bf16`, for autocast, which it leaves to its user. Tokens are random.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch
from peak_memory import forget_peak_memory, peak_memory, wait_for  # pyright: ignore[reportMissingImports]
from retro_pytorch import RETRO  # pyright: ignore[reportMissingImports]
from retro_pytorch.optimizer import get_optimizer  # pyright: ignore[reportMissingImports]


def main() -> None:
    """Answer each line with the seconds of a step and the peak of memory, as one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", type=json.loads, required=True, help="see benchmarks/training_contenders.py")
    shape = parser.parse_args().shape
    torch.set_num_threads(shape["threads"])
    torch.manual_seed(0)
    device = torch.device(shape["device"])
    model = RETRO(
        num_tokens=shape["vocab_size"],
        max_seq_len=shape["num_chunks"] * shape["chunk_length"],
        enc_dim=shape["encoder_dim"],
        dec_dim=shape["dim"],
        enc_depth=shape["encoder_layers"],
        dec_depth=shape["layers"],
        enc_cross_attn_layers=(1,),
        dec_cross_attn_layers=tuple(shape["cca_layers"]),
        chunk_size=shape["chunk_length"],
    ).to(device)
    optimizer = get_optimizer(model.parameters(), lr=1e-4)
    batch_size, num_chunks, length = shape["batch_size"], shape["num_chunks"], shape["chunk_length"]
    tokens = torch.randint(1, shape["vocab_size"], (batch_size, num_chunks * length + 1), device=device)
    of_neighbours = (batch_size, num_chunks, shape["neighbours"], 2 * length)
    neighbours = torch.randint(1, shape["vocab_size"], of_neighbours, device=device)
    print(json.dumps({"num_weights": sum(weight.numel() for weight in model.parameters())}), flush=True)
    for line in sys.stdin:
        forget_peak_memory(device)
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=line.strip() == "bf16"):
            loss = model(tokens, retrieved=neighbours, return_loss=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wait_for(device)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "peak_bytes": peak_memory(device), "loss": loss.item()}), flush=True)


if __name__ == "__main__":
    main()
