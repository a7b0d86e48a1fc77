"""The one error class of ponder_hf: input that cannot be used."""


class _UnusableInput(ValueError):
    """A parent that can be exchanged, as ValueError itself cannot: see `ponder_hf`, which makes its own the parent."""


class PonderingError(_UnusableInput):
    """Input that cannot be used. The message is one line: what is wrong and what to do about it."""
