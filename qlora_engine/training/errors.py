"""What a user can get wrong. Each message says what was given, what was expected and what to do."""

import contextlib
from collections.abc import Callable, Iterator


class UsageError(ValueError):
    """A mistake in what the user gave; the command line prints it as one sentence and exits with 2."""


class OptionError(UsageError):
    """An option with an unknown name, a wrong type or an impossible value."""


class DataError(UsageError):
    """A data file that cannot be used; the message names the file, the line and the reason."""


class ModelError(UsageError):
    """A model folder, file or hub id that cannot be used."""


class MemoryShortage(UsageError):
    """Less memory than the work needs."""


class MissingDependency(UsageError):
    """An optional package that this command needs."""


class Interrupted(Exception):
    """Training was stopped by the user after a checkpoint.

    Attributes:
        step: optimizer steps done.
        checkpoint: folder of the checkpoint that was written.
        resume: the shell command that continues the run.
    """

    def __init__(self, step: int, checkpoint: str, resume: str):
        super().__init__(f"interrupted after step {step}; checkpoint in {checkpoint}; continue with: {resume}")
        self.step, self.checkpoint, self.resume = step, checkpoint, resume


@contextlib.contextmanager
def as_usage_error(kind: type[UsageError] = UsageError) -> Iterator[None]:
    """Turns the errors that a library raises about its arguments into `kind`.

    Only for a call whose arguments come straight from the user: there a ValueError or an OSError is about them.
    """
    try:
        yield
    except UsageError:
        raise
    except (ValueError, OSError) as error:
        raise kind(one_sentence(error)) from error


def one_sentence(error: BaseException) -> str:
    """An exception's message on one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def out_of_memory_as_usage_error(advice: str | Callable[[], str]) -> Iterator[None]:
    """Turns an out-of-memory error of either device into MemoryShortage that ends with `advice`.

    Args:
        advice: a sentence, or what makes it when it is needed.
    """
    import torch

    def words() -> str:
        return advice if isinstance(advice, str) else advice()

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise MemoryShortage(f"out of memory: {one_sentence(error)[:160]}. {words()}") from error
    except RuntimeError as error:
        # the CPU allocator has no exception of its own
        if "not enough memory" not in str(error) and "DefaultCPUAllocator" not in str(error):
            raise
        raise MemoryShortage(f"out of memory on the CPU: {one_sentence(error)[:160]}. {words()}") from error
