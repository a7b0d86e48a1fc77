"""The one error class of ponder_hf: input that cannot be used."""


class PonderingError(ValueError):
    """Input that cannot be used. The message is one line: what is wrong and what to do about it."""
