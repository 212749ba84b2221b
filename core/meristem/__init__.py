"""One transformer core; every domain grows from it."""

__version__ = "0.1.0"
