"""One of two workers that train together, as Ray Train starts them: `one_of_two.py RANK HOME JOIN RUN...`.

Each RUN has the config that its config.json says.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from retro_ray.config import RunConfig
from retro_ray.training.trainer import Trainer, TrainingJob

if __name__ == "__main__":
    rank, home, join, *runs = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{join}", rank=int(rank), world_size=2)
    for run in runs:
        config = RunConfig.from_dict(json.loads((Path(run) / "config.json").read_text())["config"])
        job = TrainingJob(home=Path(home), run_directory=Path(run), config=config)
        Trainer(job, torch.device("cpu"), say=lambda line: None).run()
    dist.destroy_process_group()
