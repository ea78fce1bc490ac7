"""EleutherAI's lm_eval with the model `retro` made known to it; its flags are lm_eval's:

python -m retro_ray.lm_eval --model retro --model_args home=/data/retro,run=default --tasks TASK
"""

from __future__ import annotations

import importlib.util

from retro_ray.command_line import run
from retro_ray.errors import ConfigError


def main() -> None:
    """The command line of lm_eval.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm_eval is not installed: pip install -c constraints.txt -e .[eval]")
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    import retro_ray.evaluation.harness  # noqa: F401  (registers the model)

    cli_evaluate()


if __name__ == "__main__":
    run(main)
