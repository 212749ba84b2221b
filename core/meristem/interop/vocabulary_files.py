"""The definition of a subword tokenizer: `tokenizer.json`, or the same built from older vocabulary files.

These are word pieces (`vocab.txt`), byte pairs (`vocab.json` and `merges.txt`) and models of sentencepiece, which are
messages of protobuf, of whose numbered fields a handful matter here: they are read without schema and library.
"""

import base64
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meristem.errors import CheckpointError
from meristem.files import read_json

DEFINITION, SETTINGS = "tokenizer.json", "tokenizer_config.json"
WORDS, PAIRS, MERGES = "vocab.txt", "vocab.json", "merges.txt"
PIECES = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
"""What a directory may hold; the first that is there is read."""

CLASS = "PreTrainedTokenizerFast"
"""The foreign class that takes `tokenizer.json` as it is."""

UNIGRAM = 1
CONTROL, USER_DEFINED = 3, 4

FIRST_PIECES = ("<pad>", "</s>", "<unk>")
"""How the vocabularies begin that put `</s>` alone behind a text."""

WORD_PIECE_ROLES = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
FRAMED_ROLES = {
    "unk": "<unk>",
    "pad": "<pad>",
    "bos": "<s>",
    "eos": "</s>",
    "cls": "<s>",
    "sep": "</s>",
    "mask": "<mask>",
}
PLAIN_ROLES = {"unk": "<|endoftext|>", "bos": "<|endoftext|>", "eos": "<|endoftext|>"}
USUAL_ROLES: dict[str, Mapping[str, str]] = {
    "BertTokenizer": WORD_PIECE_ROLES,
    "RobertaTokenizer": FRAMED_ROLES,
    "LongformerTokenizer": FRAMED_ROLES,
    "GPT2Tokenizer": PLAIN_ROLES,
    "CodeGenTokenizer": PLAIN_ROLES,
    "Qwen2Tokenizer": {"unk": "<|endoftext|>", "pad": "<|endoftext|>", "eos": "<|endoftext|>"},
    "LlamaTokenizer": {"unk": "<unk>", "bos": "<s>", "eos": "</s>"},
    "T5Tokenizer": {"unk": "<unk>", "pad": "<pad>", "eos": "</s>"},
}
"""Special symbols of foreign classes of tokenizers, for roles that no file names."""


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


def read_definition(folder: Path, settings: Mapping[str, Any]) -> tuple[Path, dict[str, Any], list[str]]:
    """Read or build the definition of a tokenizer; returns the file it comes from, the definition and notes.

    Raises:
        CheckpointError: no file of a tokenizer, or one that is damaged, or of a class that cannot be built from it.
    """
    if (folder / DEFINITION).is_file():
        definition = read_object(folder / DEFINITION)
        if not isinstance(definition.get("model"), dict):
            raise CheckpointError(f"{folder / DEFINITION} must say what its model is; it does not")
        return folder / DEFINITION, definition, []
    name = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    if (folder / WORDS).is_file():
        _require_builder(folder / WORDS, name)
        notes = [] if "do_lower_case" in settings else ["capitals are read as small letters: no setting says otherwise"]
        # the last of equal symbols counts
        vocab = {symbol: i for i, symbol in enumerate(read_lines(folder / WORDS))}
        return folder / WORDS, word_pieces(folder / WORDS, vocab, settings), notes
    if (folder / PAIRS).is_file() and (folder / MERGES).is_file():
        vocab = read_object(folder / PAIRS)
        merges = [line for line in read_lines(folder / MERGES) if line and not line.startswith("#version")]
        if wrong := [line for line in merges if len(line.split(" ")) != 2]:
            raise CheckpointError(f"{folder / MERGES}: a line must hold two symbols; got {wrong[0]!r}")
        if not name:
            has_frame = {"<s>", "</s>", "<mask>"} <= set(vocab)
            name = "RobertaTokenizer" if has_frame else "GPT2Tokenizer"
        _require_builder(folder / PAIRS, name)
        pairs = byte_pairs(vocab, [tuple(line.split(" ")) for line in merges], settings)
        return folder / PAIRS, _framed(folder / PAIRS, pairs, settings) if name in FRAMED_CLASSES else pairs, []
    for file in (folder / one for one in PIECES):
        if file.is_file():
            pieces = read_pieces(file)
            if pieces.is_closed_unigram and name in PIECE_CLASSES:
                return file, unigrams(pieces, settings), []
            return file, _converted(file), []
    files = ", ".join((DEFINITION, WORDS, f"{PAIRS} with {MERGES}", *PIECES))
    raise CheckpointError(f"{folder} must hold a tokenizer, one of {files}; it holds none")


def usual_roles(settings: Mapping[str, Any], vocab: Mapping[str, int], has_roles: bool) -> Mapping[str, str]:
    """Usual special symbols by role, for the class that the settings name or that the vocabulary suggests.

    Args:
        has_roles: whether files name some; those of a directory without a class are all there are.
    """
    if name := settings.get("tokenizer_class"):
        return USUAL_ROLES.get(name.removesuffix("Fast"), {})
    if not has_roles:
        for roles, marks in (
            (WORD_PIECE_ROLES, {"[CLS]", "[SEP]"}),
            (FRAMED_ROLES, {"<s>", "</s>", "<mask>"}),
            (PLAIN_ROLES, {"<|endoftext|>"}),
            (USUAL_ROLES["T5Tokenizer"], {"</s>", "<pad>", "<extra_id_0>"}),
        ):
            if marks <= set(vocab):
                return roles
    return {}


def word_pieces(file: Path, vocab: Mapping[str, int], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Definition of a WordPiece tokenizer, which takes the longest piece first (BERT, Devlin et al. 2019)."""
    roles = {role: _name(settings, role, symbol) for role, symbol in WORD_PIECE_ROLES.items()}
    missing = [symbol for role, symbol in roles.items() if role in ("unk", "cls", "sep") and symbol not in vocab]
    if missing:
        raise CheckpointError(f"{file} must hold {missing[0]}; it does not")
    return {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": settings.get("tokenize_chinese_chars", True),
            "strip_accents": settings.get("strip_accents"),
            "lowercase": settings.get("do_lower_case", True),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": frame(roles["cls"], roles["sep"], vocab, is_paired=True),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": roles["unk"],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": dict(vocab),
        },
    }


def byte_pairs(vocab: Mapping[str, int], merges: list[tuple[str, ...]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Definition of a byte-level BPE tokenizer without symbols around a text (GPT-2, Radford et al. 2019)."""
    trimmed = {"trim_offsets": True, "use_regex": True}
    return {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": settings.get("add_prefix_space", False), **trimmed},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, **trimmed},
        "model": {"type": "BPE", "vocab": dict(vocab), "merges": [list(pair) for pair in merges]},
    }


def unigrams(read: Pieces, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Definition of a unigram tokenizer (T5, Raffel et al. 2020): sentinels after the pieces, the last one first.

    Args:
        settings: `tokenizer_config.json`; `extra_ids` is the number of sentinels.
    """
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(settings.get("extra_ids", 100)))]
    vocab = [[piece, score] for piece, score, _ in read.pieces] + [[symbol, 0.0] for symbol in sentinels]
    special = {i: kind == CONTROL for i, (_, _, kind) in enumerate(read.pieces) if kind in (CONTROL, USER_DEFINED)}
    special |= dict.fromkeys(range(len(read.pieces), len(vocab)), True)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spaces = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    charsmap = base64.b64encode(read.charsmap).decode("ascii")
    return {
        "added_tokens": [{"id": i, "content": vocab[i][0], **flags, "special": special[i]} for i in sorted(special)],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap} if read.charsmap else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, spaces]},
        "post_processor": frame(None, "</s>", {"</s>": FIRST_PIECES.index("</s>")}),
        "decoder": spaces,
        "model": {"type": "Unigram", "unk_id": read.unk_id, "vocab": vocab},
    }


def frame(before: str | None, behind: str | None, ids: Mapping[str, int], is_paired: bool = False) -> dict[str, Any]:
    """The post-processor that puts special symbols around a text.

    Args:
        is_paired: the second of two texts has nothing before it.
    """

    def text(name: str, kind: int, first: str | None) -> list[dict[str, Any]]:
        parts = (("SpecialToken", first), ("Sequence", name), ("SpecialToken", behind))
        return [{part: {"id": id, "type_id": kind}} for part, id in parts if id]

    names = sorted({name for name in (before, behind) if name})
    return {
        "type": "TemplateProcessing",
        "single": text("A", 0, before),
        "pair": [*text("A", 0, before), *text("B", 1, None if is_paired else before)],
        "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in names},
    }


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one if there is no such file.

    Raises:
        CheckpointError: the file is damaged.
    """
    return read_json(file, CheckpointError) if file.is_file() else {}


def read_lines(file: Path) -> list[str]:
    """Read the lines of a vocabulary. Only a newline ends a line; other white space belongs to symbols.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        with file.open(encoding="utf-8") as stream:
            return [line.rstrip("\n") for line in stream]
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.parent} must hold {file.name}; it does not") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} must be text in UTF-8: {error}") from error


def _name(settings: Mapping[str, Any], role: str, symbol: str) -> str:
    value = settings.get(f"{role}_token") or symbol
    return value if isinstance(value, str) else str(value.get("content"))


def _framed(file: Path, definition: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """With one symbol before and one behind a text (RoBERTa, Liu et al. 2019)."""
    vocab = definition["model"]["vocab"]
    names = [_name(settings, role, FRAMED_ROLES[role]) for role in ("sep", "cls")]
    if missing := [name for name in names if name not in vocab]:
        raise CheckpointError(f"{file} must hold {missing[0]}; it does not")
    sep, cls = ([name, vocab[name]] for name in names)
    processor = {"type": "RobertaProcessing", "sep": sep, "cls": cls, "trim_offsets": True}
    return {**definition, "post_processor": {**processor, "add_prefix_space": settings.get("add_prefix_space", False)}}


PIECE_CLASSES = ("", "T5Tokenizer", "MT5Tokenizer")
"""Foreign classes that a model of sentencepiece makes, where it is of closed unigrams."""

FRAMED_CLASSES = ("RobertaTokenizer", "LongformerTokenizer")
BUILT_CLASSES = {WORDS: ("", "BertTokenizer"), PAIRS: ("GPT2Tokenizer", "CodeGenTokenizer", *FRAMED_CLASSES)}
"""Foreign classes that older files alone make, by file; the framed ones put symbols around a text."""


def _require_builder(file: Path, name: str) -> None:
    if name not in BUILT_CLASSES[file.name]:
        raise CheckpointError(
            f"{file}: a {name} cannot be built from this file alone; save it with tokenizer.json, as a fast tokenizer"
        )


def _converted(file: Path) -> dict[str, Any]:
    """A model of sentencepiece, converted by the library that reads it.

    Raises:
        CheckpointError: that library is not installed, or does not take the file.
    """
    advice = "save the tokenizer with tokenizer.json, as a fast tokenizer"
    try:
        import sentencepiece  # noqa: F401
        from transformers import AutoTokenizer
    except ImportError as error:
        raise CheckpointError(
            f"{file}: reading it needs the packages sentencepiece, protobuf and transformers; install them, or {advice}"
        ) from error
    try:
        return json.loads(AutoTokenizer.from_pretrained(file.parent).backend_tokenizer.to_str())
    except Exception as error:  # whatever the library raises
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{file}: cannot be converted ({reason}); {advice}") from error


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
