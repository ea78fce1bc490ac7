"""API keys: who may generate, who may edit the database.

Keys are kept as SHA-256 digests, so that neither a replica's memory nor its settings hold them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from retro_ray.errors import ConfigError

Right = Literal["generate", "edit"]
RIGHTS: tuple[Right, ...] = get_args(Right)
"""`generate`: completions and retrieval; `edit`: the documents of the database."""
KEYS_VARIABLE = "RETRO_RAY_API_KEYS"
KEYS_FILE_VARIABLE = "RETRO_RAY_API_KEYS_FILE"
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")
_MIN_KEY_LENGTH = 16


@dataclass(frozen=True)
class ApiKey:
    """One key: its SHA-256 in hexadecimal digits, and what it opens."""

    digest: str
    rights: frozenset[Right]


class KeyRing:
    """The keys of a service; an empty one has none set."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        self._keys = tuple(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def rights_of(self, key: str) -> frozenset[Right] | None:
        """What `key` opens; None if there is no such key. Takes the same time for each of the answers."""
        digest = _digest(key)
        rights = None
        for known in self._keys:
            if hmac.compare_digest(known.digest, digest):
                rights = known.rights
        return rights


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[ApiKey, ...]:
    """The keys of `file`, or of the file or the text that the environment names; () if nothing does.

    Raises:
        ConfigError: the file cannot be read, is empty, or has a line that is no key.
    """
    file = file or (Path(environment[KEYS_FILE_VARIABLE]) if environment.get(KEYS_FILE_VARIABLE) else None)
    if file is None:
        text = environment.get(KEYS_VARIABLE, "")
        return parse_keys(text, KEYS_VARIABLE) if text.strip() else ()
    try:
        keys = parse_keys(file.expanduser().read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the API keys in {file} cannot be read ({error}): check api_keys_file") from error
    if not keys:
        # Taken for "no keys are set" this would open the service to everyone on this machine.
        raise ConfigError(f"{file} has no API keys: write one per line, `KEY generate,edit`")
    return keys


def parse_keys(text: str, name: str) -> tuple[ApiKey, ...]:
    """Keys from lines `KEY RIGHT,RIGHT`, or from a JSON object {KEY: [RIGHT, ...]}.

    A KEY is the key itself or `sha256:` and its digest. In lines, `#` starts a comment, and a key alone
    may generate.

    Args:
        text: what to read.
        name: where it comes from, for messages; these never contain a key.

    Raises:
        ConfigError: it has another form, a key that is short, or an unknown right.
    """
    entries = _json_entries(text, name) if text.lstrip().startswith("{") else _line_entries(text)
    keys = [_parsed(key, rights, f"{name}, {place}") for key, rights, place in entries]
    if len({key.digest for key in keys}) < len(keys):
        raise ConfigError(f"{name} has an API key twice: give each key all of its rights at once")
    return tuple(keys)


def _line_entries(text: str) -> list[tuple[str, list[str], str]]:
    entries = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split("#", 1)[0].replace(",", " ").split()
        if words:
            entries.append((words[0], words[1:] or ["generate"], f"line {number}"))
    return entries


def _json_entries(text: str, name: str) -> list[tuple[str, list[str], str]]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name} is not valid JSON ({error}): write {{KEY: [RIGHT, ...]}}, or lines") from error
    entries = []
    for number, (key, rights) in enumerate(content.items(), start=1):
        if not isinstance(rights, list) or not all(isinstance(right, str) for right in rights):
            raise ConfigError(f"{name}, entry {number}: a key's rights must be a list such as {list(RIGHTS)}")
        entries.append((key, rights, f"entry {number}"))
    return entries


def _parsed(key: str, rights: list[str], place: str) -> ApiKey:
    unknown = sorted(set(rights) - set(RIGHTS))
    if unknown or not rights:
        raise ConfigError(f"{place}: rights are {unknown or 'missing'}; there are {', '.join(RIGHTS)}")
    stored = _DIGEST.fullmatch(key)
    if stored is None and (key.startswith("sha256:") or len(key) < _MIN_KEY_LENGTH):
        raise ConfigError(
            f"{place}: a key must have at least {_MIN_KEY_LENGTH} characters (`openssl rand -hex 32` makes one), or be "
            "sha256: and 64 hexadecimal digits"
        )
    digest = stored.group(1).lower() if stored else _digest(key)
    return ApiKey(digest, frozenset(right for right in RIGHTS if right in rights))


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
