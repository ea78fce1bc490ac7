"""The built-in corpus `python-docs`: documentation that every installation of retro_ray carries.

Topics of the Python reference (`pydoc_data.topics`), and the docstrings of the standard library and
of transformers, each behind its qualified name, one document per module. Source files are parsed,
never imported. About 12 MB in all.

A unit of work lists entries `root:path`, with roots `topics`, `stdlib` and `transformers`, so that a
worker finds them in its own installation.
"""

from __future__ import annotations

import ast
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from retro_ray.errors import InputError

NAME = "python-docs"
GROUP_BYTES = 1 << 20
# Tests hold deliberately broken files; the others are no part of the standard library.
EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"})


@dataclass(frozen=True)
class ModuleDocs:
    """Documentation of one module, or why there is none."""

    name: str
    """`json.decoder`, or `topics.assert`."""
    text: str
    problem: str | None = None


def plan_groups(group_bytes: int = GROUP_BYTES) -> Iterator[tuple[tuple[str, ...], int]]:
    """(entries, bytes of source) of each unit, at most about 1 MB so that many tasks share the work."""
    limit = min(group_bytes, GROUP_BYTES)
    entries: list[str] = []
    size = 0
    for entry, entry_size in _entries():
        if entries and size + entry_size > limit:
            yield tuple(entries), size
            entries, size = [], 0
        entries.append(entry)
        size += entry_size
    if entries:
        yield tuple(entries), size


def read_docs(entry: str) -> ModuleDocs | None:
    """The documentation of one entry of `plan_groups`; None for a module without docstrings."""
    root, _, path = entry.partition(":")
    if root == "topics":
        return ModuleDocs(f"topics.{path}", _topics()[path])
    module = _module_name(root, PurePosixPath(path))
    try:
        tree = _parse((_root_folder(root) / path).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        return ModuleDocs(module, "", problem=str(error))
    sections = [f"{name}\n\n{docstring}" for name, docstring in _docstrings(tree, module)]
    return ModuleDocs(module, "\n\n".join(sections)) if sections else None


def _entries() -> Iterator[tuple[str, int]]:
    """(entry, size in bytes) of all there is, in a fixed order."""
    for topic, text in sorted(_topics().items()):
        yield f"topics:{topic}", len(text)
    for root in ("stdlib", "transformers"):
        folder = _root_folder(root)
        for path in sorted(folder.rglob("*.py")):
            relative = path.relative_to(folder)
            if EXCLUDED_FOLDERS.isdisjoint(relative.parts) and path.is_file():
                yield f"{root}:{relative.as_posix()}", path.stat().st_size


def _topics() -> dict[str, str]:
    from pydoc_data import topics  # half a megabyte, needed by this corpus only

    return topics.topics


def _root_folder(root: str) -> Path:
    if root == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(root)  # finds a package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"--input {NAME} needs the package {root}, which is not installed here: install it")
    return Path(spec.submodule_search_locations[0])


def _module_name(root: str, path: PurePosixPath) -> str:
    parts = path.with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if root == "stdlib" else (root, *parts))


def _parse(source: bytes) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other people's escape sequences
        return ast.parse(source)


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module, its classes and functions, in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring and docstring.strip():
            yield name, docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):  # a def inside `if` or `try`
            yield from _docstrings(child, name)
