"""What all commands and jobs share: flags from typed settings, one line for a user's error, exit status."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import NoReturn, TypeVar

import tyro

from retro_ray.errors import RetroRayError

Settings = TypeVar("Settings")

_USER_ERROR = 1
_INTERRUPTED = 130

FLAT_FLAGS = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes)
"""`--num-shards`, not `--database.num-shards`; `--json`, without a `--no-json` beside it."""


def parse(settings: type[Settings], prog: str, arguments: list[str] | None = None) -> Settings:
    """Settings from the command line.

    A setting's own check that fails ends the program with one line and exit status 1.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(settings, prog=prog, args=arguments, config=FLAT_FLAGS)
    except SystemExit as ending:
        # tyro draws a box around what a check says, and ends with the status of a mistyped flag.
        cause: BaseException | None = ending
        while cause is not None and not isinstance(cause, RetroRayError):
            cause = cause.__context__
        if cause is not None:
            _fail(cause)
        sys.stderr.write(said.getvalue())
        raise


def run(main: Callable[[], None], explain: Callable[[BaseException], RetroRayError | None] | None = None) -> None:
    """Run a command; what its user can mend becomes one line and exit status 1, without a traceback.

    Args:
        main: the command.
        explain: finds the user's error behind another one, such as one that Ray wrapped.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("ray", "ray.data", "faiss", "httpx", "huggingface_hub", "transformers", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    try:
        main()
    except RetroRayError as error:
        _fail(_raised(error))
    except KeyboardInterrupt:
        print("interrupted; finished work is kept", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except Exception as error:
        found = explain(error) if explain is not None else None
        if found is None:
            raise
        _fail(found)


def _raised(error: RetroRayError) -> RetroRayError:
    """The error as it was raised: Ray gives a task's error its class, but a traceback for a message."""
    while isinstance(cause := getattr(error, "cause", None), RetroRayError):
        error = cause
    return error


def _fail(error: RetroRayError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(_USER_ERROR)
