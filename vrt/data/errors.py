"""The error of everything that deals with data."""


class DataError(ValueError):
    """Data that can't be used; the message names the subject, what was expected and found, and the remedy."""
