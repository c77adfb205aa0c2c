"""The one error that a user's mistake becomes: what was expected, what was found, what to do; and being stopped."""

import signal


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
        # The parts are the arguments, so that the error survives pickling between processes.
        super().__init__(self.where, self.expected, self.found, self.advice)

    def __str__(self) -> str:
        """Return the line that is shown to the user."""
        line = f"{self.where}: expected {self.expected}, found {self.found}"
        return f"{line}; {self.advice}" if self.advice else line


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
