"""Models of sentencepiece (`spiece.model`), read without its library: those of T5 and of what follows it.

The file is a message of protobuf, of whose numbered fields a handful matter here: they are read without its schema.
"""

import base64
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meristem.errors import CheckpointError

UNIGRAM = 1
CONTROL, USER_DEFINED = 3, 4
SPACE = "\u2581"

FIRST_PIECES = ("<pad>", "</s>", "<unk>")
"""How the vocabularies begin that put `</s>` alone behind a text."""


@dataclass(frozen=True)
class Pieces:
    """What a model of sentencepiece holds.

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
    """Read a model of sentencepiece.

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


def unigrams(read: Pieces, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer.json` of closed unigrams (T5, Raffel et al. 2020): sentinels behind the pieces, the last one first.

    Args:
        read: the pieces.
        settings: `tokenizer_config.json`; `extra_ids` is the number of sentinels.
    """
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(settings.get("extra_ids", 100)))]
    vocab = [[piece, score] for piece, score, _ in read.pieces] + [[symbol, 0.0] for symbol in sentinels]
    own = {i: kind == CONTROL for i, (_, _, kind) in enumerate(read.pieces) if kind in (CONTROL, USER_DEFINED)}
    found = {**own, **dict.fromkeys(range(len(read.pieces), len(vocab)), True)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spaces = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
    end = "</s>"
    framed = [[{"Sequence": {"id": text, "type_id": 0}}, {"SpecialToken": {"id": end, "type_id": 0}}] for text in "AB"]
    charsmap = base64.b64encode(read.charsmap).decode("ascii")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": vocab[i][0], **flags, "special": found[i]} for i in sorted(found)],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap} if read.charsmap else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, spaces]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": framed[0],
            "pair": framed[0] + framed[1],
            "special_tokens": {end: {"id": end, "ids": [FIRST_PIECES.index(end)], "tokens": [end]}},
        },
        "decoder": spaces,
        "model": {"type": "Unigram", "unk_id": read.unk_id, "vocab": vocab, "byte_fallback": False},
    }


def _fields(message: bytes) -> list[tuple[int, Any]]:
    """Numbers and values of the fields of a message: bytes, or whole numbers (also the bits of a float)."""
    from google.protobuf.empty_pb2 import Empty
    from google.protobuf.unknown_fields import UnknownFieldSet

    return [(field.field_number, field.data) for field in UnknownFieldSet(Empty.FromString(message))]
