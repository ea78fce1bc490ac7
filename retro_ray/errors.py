"""The errors that retro_ray raises for what its user can mend.

Every message is one line that names the offending value, the setting and the way out. All
classes take the message alone, so that they pickle across Ray's processes unchanged.
"""

from __future__ import annotations


class RetroRayError(ValueError):
    """Base of all errors a user can mend; the command line prints it without a traceback."""


class InputError(RetroRayError):
    """The documents given cannot be read as asked: no file, no column, a doubled id."""


class ConfigError(RetroRayError):
    """A setting has a value that cannot work, alone or together with another."""


class DatabaseError(RetroRayError):
    """A retrieval database is missing, torn, or not what its manifest lists."""


class MismatchError(RetroRayError):
    """Two artefacts do not belong together: their fingerprints differ."""


class CheckpointError(RetroRayError):
    """A checkpoint is missing or torn."""


class RetrievalError(RetroRayError):
    """A query could not be answered; names the shard, the cause and the setting."""


class PromptError(RetroRayError):
    """A generation request that cannot be served: too long, or a value out of range."""
