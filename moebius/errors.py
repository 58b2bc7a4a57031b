"""What can go wrong, by kind; the command line maps kinds to exit codes. Messages name what, where, found, expected."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SHOWN_FAULTS = 20


@dataclass(frozen=True)
class Fault:
    """One thing wrong with an input.

    where: the tensor, file or config field.  what: the kind, in a word or two ("missing", "shape", "unknown field").
    detail: expected and found.
    """

    where: str
    what: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f": {self.detail}" if self.detail else "")


class MoebiusError(Exception):
    """The base of every error that Moebius raises on purpose.

    message: one line.  faults: all that was found, gathered before raising.  advice: what to do about it, one line.
    exit_code: what the command line ends with.
    """

    exit_code = 1

    def __init__(self, message: str, *, faults: Iterable[Fault] = (), advice: str = ""):
        super().__init__(message)
        self.message = message
        self.faults: Sequence[Fault] = tuple(faults)
        self.advice = advice

    def __str__(self) -> str:
        return "\n".join(
            [self._headline(), *self._fault_lines(), *([f"what to do: {self.advice}"] if self.advice else [])]
        )

    def to_json(self) -> dict[str, object]:
        """Message, advice and every fault, as plain data."""
        faults = [{"where": fault.where, "what": fault.what, "detail": fault.detail} for fault in self.faults]
        return {"error": self.message, "faults": faults, "what_to_do": self.advice}

    def _headline(self) -> str:
        return f"{self.message}: {self.faults[0]}" if len(self.faults) == 1 else self.message

    def _fault_lines(self) -> list[str]:
        if len(self.faults) < 2:
            return []
        lines = [f"  {fault}" for fault in self.faults[:SHOWN_FAULTS]]
        hidden = len(self.faults) - SHOWN_FAULTS
        return lines + ([f"  ... and {hidden} more"] if hidden > 0 else [])


class InputError(MoebiusError):
    """An input was refused; nothing was done with it."""

    exit_code = 3


class ArgumentError(InputError, ValueError):
    """An argument of the Python API is unknown, unsupported or out of range."""


class ConfigError(InputError):
    """A config.json is missing, broken, or says something that is not implemented."""


class CheckpointError(InputError):
    """A checkpoint's files are not what its config says; no half-filled model was returned."""


class TokenizerError(InputError):
    """A tokenizer or chat template is missing, broken or refused."""


class BackendError(InputError):
    """A backend that was asked for by name cannot run here; it is never replaced in silence."""


class CapacityError(MoebiusError):
    """The work does not fit; said before a weight is read."""

    exit_code = 4


class RankError(MoebiusError):
    """Another rank failed, went away, or did not answer in time; this one cannot go on alone."""

    exit_code = 5


class SaveError(MoebiusError):
    """A save could not be finished; what stood at its destination is still there."""
