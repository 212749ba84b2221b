"""Read sentencepiece models (`spiece.model`, of T5 and later models) without the sentencepiece library.

The file is a message of protobuf, of whose numbered fields a handful matter here: they are read without its schema.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meristem.errors import CheckpointError

UNIGRAM = 1
CONTROL, USER_DEFINED = 3, 4

FIRST_PIECES = ("<pad>", "</s>", "<unk>")
"""How the vocabularies begin that put `</s>` alone behind a text."""


@dataclass(frozen=True)
class Pieces:
    """The parts of a sentencepiece model that a tokenizer needs.

    Attributes:
        pieces: text, score (log-probability) and type of each piece, in the order of ids.
        model_type: 1 for unigrams, 2 for byte pairs.
        unk_id: the piece of unknown text.
        charsmap: how characters are made plain before a text is cut, compiled; empty for not at all.
    """

    pieces: tuple[tuple[str, float, int], ...]
    model_type: int
    unk_id: int
    charsmap: bytes

    @property
    def is_closed_unigram(self) -> bool:
        """Whether pieces are unigrams that are used with an end and without a beginning."""
        return self.model_type == UNIGRAM and tuple(piece for piece, *_ in self.pieces[:3]) == FIRST_PIECES


def read_pieces(file: Path) -> Pieces:
    """Read a sentencepiece model file.

    Raises:
        CheckpointError: the file is damaged, or another one.
    """
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    from google.protobuf.message import DecodeError

    try:
        for number, value in _fields(file.read_bytes()):
            if number == 1:
                parts = dict(_fields(value))
                score = struct.unpack("<f", struct.pack("<I", parts.get(2, 0)))[0]
                pieces.append((parts[1].decode("utf-8"), score, parts.get(3, 1)))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
        if not pieces:
            raise ValueError("it holds no pieces")
        return Pieces(tuple(pieces), trainer.get(3, UNIGRAM), trainer.get(40, 0), bytes(normalizer.get(2, b"")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, DecodeError) as error:
        raise CheckpointError(f"{file} must be a model of sentencepiece: {error}") from error


def _fields(message: bytes) -> list[tuple[int, Any]]:
    """Numbers and values of the fields of a message: bytes, or whole numbers (also the bits of a float)."""
    from google.protobuf.empty_pb2 import Empty
    from google.protobuf.unknown_fields import UnknownFieldSet

    return [(field.field_number, field.data) for field in UnknownFieldSet(Empty.FromString(message))]
