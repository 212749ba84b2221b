"""The families that are at home. A new one is a file like `esm.py` and a line here."""

from meristem.errors import CheckpointError
from meristem.interop.esm import ESM
from meristem.interop.family import Family, ForeignConfig

FAMILIES: tuple[Family, ...] = (ESM,)


def find_family(where: object, config: ForeignConfig) -> Family:
    """The family of a foreign config.

    Raises:
        CheckpointError: none of those at home.
    """
    for family in FAMILIES:
        if family.recognises(config):
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise CheckpointError(f"{where}: model_type must be of a family that is at home ({known}); got {_kind(config)}")


def _kind(config: ForeignConfig) -> str:
    return repr(config.get("model_type", "none: is this a Hugging Face or Meristem model directory?"))
