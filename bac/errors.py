"""The errors of this project: every refusal is one sentence with what, expected, got and how to mend it."""


class BacError(ValueError):
    """Base of every refusal; catch it to handle all of them."""


class InvalidInput(BacError):
    """A value is outside its documented range, shape or dtype."""


class Mismatch(BacError):
    """Two artefacts do not belong together (schedule and checkpoint, profile and sampler, ...)."""


class CorruptArtefact(BacError):
    """A file is truncated, foreign or holds values no run of ours can have written."""


class MissingArtefact(BacError):
    """A file or optional package that the work needs does not exist."""


class Unavailable(BacError):
    """This machine or this network lacks what was asked for: a compiler, a GPU, a plain form."""


class TooLarge(Unavailable):
    """An executor cannot hold a plan of so many operations."""


def sentence(what: str, *, expected: object, got: object, mend: str) -> str:
    """Return ``what: expected E, got G; mend.`` on one line."""
    return f"{what}: expected {expected}, got {got}; {mend}."
