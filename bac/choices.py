"""Named choices, and reading one, refusing an unknown name by naming the known ones."""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

from bac.errors import InvalidInput, sentence


class Choice(str, Enum):
    """One of a fixed set of names; it is its name as text. ``enum.StrEnum`` is that from Python 3.11 on."""

    __str__ = str.__str__


_Choice = TypeVar("_Choice", bound=Choice)


def choice(what: str, value: str, choices: type[_Choice]) -> _Choice:
    """Return the member of ``choices`` called ``value``.

    Raises:
        InvalidInput: there is none; the sentence begins with ``what``.
    """
    try:
        return choices(value)
    except ValueError as error:
        allowed = ", ".join(choices)
        raise InvalidInput(
            sentence(what, expected=f"one of {allowed}", got=value, mend="choose one of these")
        ) from error
