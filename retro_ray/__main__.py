"""`python -m retro_ray COMMAND`."""

from __future__ import annotations

from typing import Annotated

import tyro

from retro_ray.command_line import parse, run
from retro_ray.commands.add import Add
from retro_ray.commands.assess import Assess
from retro_ray.commands.compact import Compact
from retro_ray.commands.delete import Delete
from retro_ray.commands.demo import Demo
from retro_ray.commands.generate import Generate
from retro_ray.commands.inspect import Inspect
from retro_ray.commands.plan import Plan
from retro_ray.commands.report import Report
from retro_ray.commands.search import Search
from retro_ray.commands.update import Update
from retro_ray.commands.verify import Verify

Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Search, tyro.conf.subcommand("search")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Assess, tyro.conf.subcommand("assess")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Add, tyro.conf.subcommand("add")]
    | Annotated[Delete, tyro.conf.subcommand("delete")]
    | Annotated[Update, tyro.conf.subcommand("update")]
    | Annotated[Compact, tyro.conf.subcommand("compact")]
)


def main() -> None:
    """Run the command that the command line names."""
    command = parse(Command, "python -m retro_ray")  # type: ignore[arg-type]
    run(command.run)


if __name__ == "__main__":
    main()
