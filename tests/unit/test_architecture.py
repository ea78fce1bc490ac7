"""The structure that CONTRIBUTING.md describes, checked on the code's own imports."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "retro_ray").rglob("*.py"))

# Each part may import from the parts named before it, and from itself.
LAYERS = [
    {"errors", "progress", "allocator", "openmp", "file_lock"},
    {"config", "command_line", "precision"},
    {"text", "embedding", "recipes"},
    {"index"},
    {"database"},
    {"ray_session"},
    {"retrieval", "model"},
    {"building"},
    {"training", "evaluation", "generation"},
    {"serve", "commands", "lm_eval"},
    {"__main__"},
]
RAY_MODULES = {
    "building/build.py",
    "building/embed_units.py",
    "commands/demo.py",
    "commands/report.py",
    "evaluation/near_duplicates.py",
    "evaluation/workers.py",
    "ray_session.py",
    "retrieval/announce.py",
    "retrieval/open.py",
    "retrieval/ray_transport.py",
    "retrieval/shard_actor.py",
    "retrieval/sharded.py",
    "serve/__init__.py",
    "serve/app.py",
    "training/launch.py",
    "training/loop.py",
}


def imported(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "retro_ray").as_posix()


def part_of(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_adapters_import_ray(path: Path) -> None:
    imports_ray = any(name == "ray" or name.startswith("ray.") for name in imported(path))
    uses_ray = imports_ray or any(re.match(r"retro_ray\.ray_session", name) for name in imported(path))
    assert not uses_ray or name_of(path) in RAY_MODULES


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    levels = {part: level for level, parts in enumerate(LAYERS) for part in parts}
    own = part_of(name_of(path))
    if own == "__init__":
        return
    assert own in levels, f"{own} has no layer: add it where it belongs"
    for name in imported(path):
        if not name.startswith("retro_ray."):
            continue
        other = name.split(".")[1]
        if other in levels:
            assert levels[other] <= levels[own], f"{name_of(path)} imports {name}"


def test_no_file_imports_one_that_imports_it() -> None:
    """Not through others either, nor for its types alone."""
    names = {
        f"retro_ray.{name_of(path).removesuffix('.py').replace('/', '.')}": path
        for path in MODULES
        if path.stem != "__init__"  # a package's name stands for any of its files
    }
    graph = {name: imported(path) & (names.keys() - {name}) for name, path in names.items()}
    circle: list[str] = []
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1]
    assert not circle, " -> ".join(circle)


def test_the_model_knows_nothing_of_retrieval() -> None:
    for path in (ROOT / "retro_ray" / "model").glob("*.py"):
        allowed = tuple(f"retro_ray.{part}" for part in ("model", "config", "errors", "precision"))
        ours = [name for name in imported(path) if name.startswith("retro_ray.")]
        assert all(name.startswith(allowed) for name in ours), path


def test_nothing_is_pickled_and_no_shell_is_run() -> None:
    forbidden = re.compile(
        r"^\s*(import|from) pickle|shell=True|torch\.(load|save)\(|(?<![.\w])eval\(|except\s*:", re.MULTILINE
    )
    for path in [*MODULES, *(ROOT / "jobs").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        assert not forbidden.search(path.read_text()), path


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    """`--help` in a moment: torch, ray, faiss and transformers load when a command runs, not before."""
    script = (
        "import sys; import retro_ray.__main__; "
        "print([name for name in ('torch', 'ray', 'faiss', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_fsdp_loads_what_fsdp_needs() -> None:
    """A second, in every process that trains, evaluates or serves."""
    script = "import sys; import retro_ray.training.trainer; print('torch.distributed.tensor' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
