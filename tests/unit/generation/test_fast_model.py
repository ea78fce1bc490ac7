"""A model made ready to generate."""

import subprocess
import sys
from pathlib import Path

import torch
from numba.core.dispatcher import Dispatcher

from retro_ray.generation.fast_model import fast_model
from retro_ray.model import compiled_rows
from tests.unit.model.models import LLAMA_BLOCKS, random_batch, random_model, small_config

ROOT = Path(__file__).parents[3]
BLOCKS = ({}, {"cca_layers": ()}, LLAMA_BLOCKS)


def num_compiled() -> dict[str, int]:
    """How often each loop has been compiled, for other types each time."""
    loops = {name: loop for name, loop in vars(compiled_rows).items() if isinstance(loop, Dispatcher)}
    return {name: len(loop.signatures) for name, loop in loops.items()}


def main() -> None:
    """Prints what the first answers of some models had to compile."""
    for blocks in BLOCKS:
        for int8 in (False, True):
            model = fast_model(random_model(small_config(**blocks)).float(), int8=int8)
            before = num_compiled()
            batch = random_batch(model.config, batch_size=3, num_tokens=8)
            cache = model.new_cache(3, 12)
            model.prefill(batch.tokens_BT[:, :3], torch.tensor([3, 1, 3]), cache)
            neighbours = batch.neighbours_BLKR[:, 0], batch.mask_BLKR[:, 0]
            for num_new in ([1, 1, 1], [2, 0, 1]):
                model.decode_tokens(batch.tokens_BT[:, 0], num_new, cache, *neighbours)
            for name, count in num_compiled().items():
                if count != before[name]:
                    print(blocks, int8, name, flush=True)
    assert num_compiled()["read_past"] > 0


def test_nothing_is_left_to_compile_for_the_first_answer() -> None:
    """In a process of its own, in which nothing has been compiled before."""
    command = [sys.executable, "-m", "tests.unit.generation.test_fast_model"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


if __name__ == "__main__":
    main()
