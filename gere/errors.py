"""Every failure that `gere` reports has a name of its own, and says what to do next."""

from __future__ import annotations


class GeReError(Exception):
    """Base of all errors raised by this library.

    Args:
        what: One sentence on what went wrong.
        where: The file, field or argument concerned.
        expected: What would have been accepted.
        found: What was there instead.
        fix: The ways on, ready to be followed.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
    ) -> None:
        parts = [what]
        parts += [f"  where:    {where}"] if where is not None else []
        parts += [f"  expected: {expected}"] if expected is not None else []
        parts += [f"  found:    {found}"] if found is not None else []
        parts += [f"  next:     {fix}"] if fix is not None else []
        super().__init__("\n".join(parts))
        self._parts = (what, where, expected, found, fix)

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the message when a data loader worker sends the error to its parent process."""
        return _rebuild, (type(self), self._parts)


def _rebuild(cls: type[GeReError], parts: tuple[str, object, object, object, str | None]) -> GeReError:
    what, where, expected, found, fix = parts
    return cls(what, where=where, expected=expected, found=found, fix=fix)


class ConfigError(GeReError, ValueError):
    """An argument has a value that cannot be used."""


class UnsupportedSettingError(ConfigError):
    """A `TrainingArguments` setting does not go together with replay."""


class ReplaySetError(GeReError, ValueError):
    """The replay set is missing, empty, too short or has unusable rows."""


class ReplayDownloadError(ReplaySetError):
    """The replay set could not be fetched from the hub."""


class TokenizerError(GeReError, ValueError):
    """The tokenizer lacks something that replay needs."""


class UnsupportedModelError(GeReError, TypeError):
    """The model has no last-layer state that could be anchored."""


class NonFiniteStateError(GeReError, ArithmeticError):
    """The base model gave NaN or infinite states or losses on the replay set."""


class RunFolderError(GeReError, ValueError):
    """A run folder that a report shall show is none, or a file of it is damaged."""


class RankFailedError(GeReError, RuntimeError):
    """Another process of the run failed in a step that all must finish."""


class QuestionError(GeReError, ValueError):
    """The questions of a multiple-choice task are missing or cannot be used."""


class MissingPackageError(GeReError, ImportError):
    """An optional package is needed that is not installed."""


class CacheError(GeReError):
    """Base of everything that can be wrong with an anchor on disk."""


class CacheFolderError(CacheError):
    """The cache folder is a file, cannot be written, or its disk is full."""


class CacheMissingError(CacheError):
    """An anchor that a checkpoint names is not in the cache folder."""


class CacheMismatchError(CacheError):
    """An anchor was made from another model, text, tokenizer, length or band.

    Attributes:
        fields: Names of the fields that differ.
    """

    fields: tuple[str, ...] = ()


class CacheCorruptError(CacheError):
    """The bytes of an anchor are not those that were written."""
