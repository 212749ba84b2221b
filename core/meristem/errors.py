"""Errors that users can mend. Anything else that escapes is our fault.

A message says what must hold, what was got, what is allowed and what to do, in one line:
`width must be divisible by num_heads; got width=500, num_heads=12; nearest: 504 (architecture.width)`.
"""


class UserError(Exception):
    """The user's input or configuration is wrong; the command line ends with exit code 2."""


class ConfigError(UserError):
    """A configuration value, or a combination of values, cannot work."""


class DataError(UserError):
    """An input record or file cannot be used; the message names file and line (`reads.fa:1203`)."""


class CheckpointError(UserError):
    """A model directory or checkpoint is incomplete, foreign or damaged."""


def require(condition: bool, rule: str, got: object) -> None:
    """Raise a `ConfigError` that says the rule and what was got, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{rule}; got {got}")


class DataWarning(UserWarning):
    """A choice was made in reading an input that the user may want otherwise."""


class PackageWarning(UserWarning):
    """An installed package cannot be used; what does not need it goes on."""
