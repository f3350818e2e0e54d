"""Failures that `gere` reports: each has its own class, and its message says what to do next."""

from __future__ import annotations

import reprlib
from functools import partial


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxtuple = self.maxlist = self.maxdict = self.maxset = self.maxfrozenset = 20
        self.maxstring = self.maxother = 400

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write an integer of thousands of digits.
        return repr(x) if abs(x) < 10**60 else f"a whole number of {x.bit_length()} bits"


def brief(value: object) -> str:
    """Show a value in a message: in full where it is small, its beginning where it is large.

    A few lines of YAML can stand for a list of billions of values, which `repr` would write out.
    """
    text = _Brief().repr(value)
    return text if len(text) <= 2000 else f"{text[:2000]}..."


class GeReError(Exception):
    """Base of all errors raised by this library.

    Args:
        what: One sentence on what went wrong.
        where: The file, field or argument concerned.
        expected: What would have been accepted.
        found: What was there instead.
        fix: What to do next.
    """

    def __init__(
        self, what: str, *, where: object = None, expected: object = None, found: object = None, fix: str | None = None
    ) -> None:
        lines = [what]
        for title, value in (("where:", where), ("expected:", expected), ("found:", found), ("next:", fix)):
            if value is not None:
                shown = brief(value) if isinstance(value, list | tuple | dict | set | int) else value
                lines.append(f"  {title:<9} {shown}")
        super().__init__("\n".join(lines))
        self._again = partial(type(self), what, where=where, expected=expected, found=found, fix=fix)

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the message when a data loader worker sends the error to its parent process."""
        # Exception would call the class with the whole message as `what`, and drop the keyword arguments.
        return self._again, ()


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
    """The base model gave NaN or infinite states or losses on the replay set, or a training did."""


class RunFolderError(GeReError, ValueError):
    """A folder given to a report is not a run folder, or one of its files is damaged."""


class RankFailedError(GeReError, RuntimeError):
    """Another process of the run failed in a step that all must finish."""


class QuestionError(GeReError, ValueError):
    """The questions of a multiple-choice task are missing or cannot be used."""


class MissingPackageError(GeReError, ImportError):
    """An optional package is needed that is not installed."""


class BlendError(GeReError, ValueError):
    """There is no line between two sets of weights, or a point of it cannot be measured or written."""


class CheckpointError(GeReError, ValueError):
    """A checkpoint is not whole, or its weights did not arrive in the model."""


class CacheError(GeReError):
    """Base of all errors about an anchor on disk."""


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
