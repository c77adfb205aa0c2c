"""The one error that a user's mistake becomes: what was expected, what was found, what to do; and being stopped."""

import difflib
import importlib
import re
import signal
from collections.abc import Iterable
from typing import Any

SIDES = {"l": "left", "lh": "left", "left": "left", "r": "right", "rh": "right", "right": "right"}
LISTED = 20
"""Known words that a hint lists; of more it says how many there are."""


class InputError(ValueError):
    """A mistake in what the user gave, told in one line.

    Attributes:
        where: The file or field that is wrong.
        expected: What would have been right.
        found: What is there.
        advice: What to do about it; may be empty.
    """

    def __init__(self, where: object, expected: object, found: object, advice: object = ""):
        """Keep the four parts; each is flattened to one line."""
        self.where, self.expected, self.found, self.advice = (
            " ".join(str(part).split()) for part in (where, expected, found, advice)
        )
        super().__init__(str(self))  # what others, such as the parser of the command line, take for the message

    def __reduce__(self) -> tuple[type["InputError"], tuple[str, ...]]:
        """Survive pickling between processes."""
        return InputError, (self.where, self.expected, self.found, self.advice)

    def __str__(self) -> str:
        """Return the line that is shown to the user."""
        line = f"{self.where}: expected {self.expected}, found {self.found}"
        return f"{line}; {self.advice}" if self.advice else line


def reason_of(error: InputError | OSError | MemoryError, path: object) -> str:
    """Say in one line why a file could not be used."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"{path}: not enough memory {error}".rstrip()
    return f"{path}: {type(error).__name__}: {error}"


class Interrupted(KeyboardInterrupt):
    """A run that was told to stop, and saved first.

    Attributes:
        number: The signal.
        position: Where it stopped, in words.
    """

    def __init__(self, number: int, position: str):
        """Keep the signal and the place."""
        self.number, self.position = number, position
        super().__init__(number, position)

    def __str__(self) -> str:
        """Return the line that is shown to the user."""
        name = signal.Signals(self.number).name
        return f"stopped by {name} after {self.position}, which is saved; the same command continues there"


def listed(names: Iterable[str], most: int = 8) -> str:
    """Return names in a line, each cut at 120 characters, and their number beyond some."""
    names = [name if len(name) <= 120 else f"{name[:120]}..." for name in names]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def require_extra(package: str, extra: str, where: str, purpose: str = "", otherwise: str = "") -> Any:
    """Import a package that comes with an extra alone, and return it.

    Args:
        package: Its name.
        extra: That it comes with: pip install 'jaxmed[EXTRA]'.
        where: The field or the work that asks for it.
        purpose: What it is needed for, such as "for tree search".
        otherwise: What to do without it.

    Raises:
        InputError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        expected, advice = f"the package {package} {purpose}", f"pip install 'jaxmed[{extra}]'{otherwise}"
        raise InputError(where, expected, "none installed", advice) from error


def nearest(word: str, known: Iterable[str]) -> str:
    """Return advice naming the known word most like an unknown one, or what is known."""
    known = list(known)
    close = closest(word, known)
    if close is not None:
        return f"did you mean '{close}'?"
    more = f" and {len(known) - LISTED} more" if len(known) > LISTED else ""
    return f"known: {', '.join(known[:LISTED])}{more}"


def closest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Return the known word most like another, whatever the case; never the same region of the other hemisphere."""
    side = side_of(word)
    alike = {name.lower(): name for name in known if None in (side, side_of(name)) or side == side_of(name)}
    found = difflib.get_close_matches(word.lower(), alike, n=1, cutoff=cutoff)
    return alike[found[0]] if found else None


def side_of(name: str) -> str | None:
    """Return "left" or "right" where a region's name says so, as in L_hippocampus, ctx-rh-insula or LeftThalamus."""
    words = [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    sides = {SIDES[word] for word in words if word in SIDES}
    return sides.pop() if len(sides) == 1 else None
