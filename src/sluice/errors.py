"""Everything Sluice raises on purpose.

```
SluiceError
├── ConfigError            a recipe, flag or value is wrong               exit 2
├── DataError              a source, row or prompt cannot be used         exit 3
├── RewardError            a verifier returned something that is no score exit 4
├── EngineError            an engine died, refused or timed out           exit 5
│   ├── CapabilityError    the engine lacks something the run needs
│   └── Unroutable         the engine may serve nothing until reloaded
├── WeightsError           weights could not be published or applied      exit 6
├── TrainError             the trainer cannot go on                       exit 7
│   └── RanksLost          a trainer rank died or lost touch; another try may succeed
├── CheckpointError        a checkpoint is missing, torn or of another run exit 8
├── LogError               the durable log cannot be written or read      exit 9
└── SandboxError           untrusted code could not be confined or run    exit 10
```

The rule for a new class: somebody catches it by name. Otherwise use the nearest one above. A message says
what happened, why, and the next move; `hint` carries the next move so that the terminal can set it apart.
"""

from __future__ import annotations


class SluiceError(Exception):
    """Base of every error a user may see without a traceback.

    Args:
        message: what happened and why, one or two sentences.
        hint: the next move. May be empty when the message already contains it.
    """

    exit_code: int = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}\n  → {self.hint}" if self.hint else text


class ConfigError(SluiceError):
    """A recipe, a flag or a value is wrong."""

    exit_code = 2


class DataError(SluiceError):
    """A source, a row or a prompt cannot be used."""

    exit_code = 3


class RewardError(SluiceError):
    """A reward or verifier is set up wrongly, or returned something that is not a finite number."""

    exit_code = 4


class EngineError(SluiceError):
    """An inference engine died, refused a request or did not answer in time."""

    exit_code = 5


class CapabilityError(EngineError):
    """The engine lacks something the run needs. Raised at the handshake, before any training."""


class Unroutable(EngineError):  # noqa: N818 - the state is the name
    """A failed weight update left the engine in an unknown state: it serves nothing until a full reload."""


class WeightsError(SluiceError):
    """Weights could not be published, verified or applied."""

    exit_code = 6


class TrainError(SluiceError):
    """The trainer cannot go on: a sample does not fit, a loss is not finite, a model cannot be built."""

    exit_code = 7


class RanksLost(TrainError):  # noqa: N818 - the state is the name
    """A trainer rank died, its node did, or ranks lost touch. The run may go on from its last checkpoint."""


class CheckpointError(SluiceError):
    """A checkpoint is missing, torn, or belongs to another run or architecture."""

    exit_code = 8


class LogError(SluiceError):
    """The durable log cannot be written or read."""

    exit_code = 9


class SandboxError(SluiceError):
    """Untrusted code could not be confined or run: the sandbox failed, not the code."""

    exit_code = 10
