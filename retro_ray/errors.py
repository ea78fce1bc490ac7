"""The errors that retro_ray raises for what its user can mend.

Every message is one line that names the offending value, the setting and the way out. Classes take
the message alone, or say how they pickle, so that they cross Ray's processes unchanged.
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


class BusyError(DatabaseError):
    """A database that something else is changing: to be tried again."""


class MismatchError(RetroRayError):
    """Two artefacts do not belong together: their fingerprints differ."""


class CheckpointError(RetroRayError):
    """A checkpoint is missing or torn."""


class RetrievalError(RetroRayError):
    """A query could not be answered; names the shard, the cause and the setting."""


class PromptError(RetroRayError):
    """A generation request that cannot be served: too long, or a value out of range."""


class OverloadedError(RetroRayError):
    """More requests than can wait, or a service that is shutting down: to be asked again later.

    Args:
        message: what is full, and how much it holds.
        retry_after_s: when it is worth trying again.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[OverloadedError], tuple[str, float]]:
        return OverloadedError, (str(self), self.retry_after_s)


class DeadlineError(RetroRayError):
    """A request was not finished by its deadline."""
