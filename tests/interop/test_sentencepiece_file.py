"""Models of sentencepiece, read without its library: ids of `transformers`, and of the library where it is there."""

import base64
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from transformers import T5Tokenizer

from meristem.errors import CheckpointError
from meristem.interop.vocabulary import read_subwords
from meristem.interop.vocabulary_files import read_pieces
from small_vocabularies import README, random_texts, trained

NUM_SENTINELS = 5


def whole_number(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, int):
        return whole_number(number << 3) + whole_number(value)
    if isinstance(value, float):
        return whole_number(number << 3 | 5) + struct.pack("<f", value)
    return whole_number(number << 3 | 2) + whole_number(len(value)) + value


def model_of(vocab: list[tuple[str, float]], charsmap: bytes = b"", model_type: int = 1, unk_id: int = 2) -> bytes:
    """A model as the library writes it: pieces, settings of training (some that do not matter), the normaliser's."""
    kinds = {"<unk>": 2, "<pad>": 3, "</s>": 3}
    pieces = [
        field(1, piece.encode()) + field(2, score) + (field(3, kinds[piece]) if piece in kinds else b"")
        for piece, score in vocab
    ]
    trainer = field(1, b"README") + field(3, model_type) + field(10, 0.5) + field(40, unk_id) + field(41, (1 << 64) - 1)
    normalizer = field(1, b"nmt_nfkc") + (field(2, charsmap) if charsmap else b"")
    return b"".join(field(1, piece) for piece in pieces) + field(2, trainer) + field(3, normalizer)


def vocab() -> list[tuple[str, float]]:
    """Pieces whose scores fit in 32 bits, as the file has them."""
    pieces = json.loads(trained("unigrams").to_str())["model"]["vocab"]
    return [(piece, float(np.float32(score))) for piece, score in pieces]


def test_ids_are_those_of_transformers(tmp_path: Path, rng: np.random.Generator):
    (tmp_path / "spiece.model").write_bytes(model_of(vocab()))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": NUM_SENTINELS}))
    tokenizer, notes = read_subwords(tmp_path, {"vocab_size": len(vocab()) + NUM_SENTINELS})
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(NUM_SENTINELS))]
    reference = T5Tokenizer(vocab=[*vocab(), *sentinels], extra_ids=NUM_SENTINELS)
    for text in random_texts(rng):
        assert tokenizer.encode(text).ids.tolist() == reference(text)["input_ids"], repr(text)
    assert notes == []
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, None)
    assert tokenizer.vocab[-1] == "<extra_id_0>"
    assert tokenizer.num_special == (0, 1)
    assert set(tokenizer.special_ids) == {0, 1, 2, *range(len(vocab()), len(vocab()) + NUM_SENTINELS)}


def test_every_part_of_the_file_is_read(tmp_path: Path):
    file = tmp_path / "spiece.model"
    file.write_bytes(model_of(vocab(), charsmap=bytes(range(256)) * 2))
    read = read_pieces(file)
    assert [(piece, score) for piece, score, _ in read.pieces] == vocab()
    assert [kind for *_, kind in read.pieces[:4]] == [3, 3, 2, 1]
    assert (read.model_type, read.unk_id, read.is_closed_unigram) == (1, 2, True)
    assert base64.b64encode(read.charsmap) == base64.b64encode(bytes(range(256)) * 2)


def test_other_or_damaged_models_are_refused(tmp_path: Path):
    whole = model_of(vocab())
    # byte pairs need the library, which knows their merges
    others = {"bytes": model_of(vocab(), model_type=2), "order": model_of(vocab()[3:] + vocab()[:3])}
    for name, data in {"cut": whole[:-3], "empty": b"", "text": b"no model", **others}.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "spiece.model").write_bytes(data)
        match = "install them" if name in others else "must be a model of sentencepiece"
        if name in others and _has_library():
            continue
        with pytest.raises(CheckpointError, match=match) as caught:
            read_subwords(folder, {})
        assert str(folder / "spiece.model") in str(caught.value)
        assert "\n" not in str(caught.value)


def test_ids_are_those_of_the_library_that_trained_the_model(tmp_path: Path, rng: np.random.Generator):
    library = pytest.importorskip("sentencepiece")
    library.SentencePieceTrainer.train(
        input=str(README), model_prefix=str(tmp_path / "spiece"), vocab_size=400, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    tokenizer, _ = read_subwords(tmp_path, {})
    reference = library.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    for text in random_texts(rng):
        if "<" not in text:  # where special symbols are spelled out, the library takes them as text
            assert tokenizer.encode(text).ids.tolist() == [*reference.encode(text), 1], repr(text)


def _has_library() -> bool:
    try:
        import sentencepiece  # noqa: F401
    except ImportError:
        return False
    return True
