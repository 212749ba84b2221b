"""A column is encoded as a loop over its symbols would, whatever the alphabet, the column's type and its offset."""

import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meristem.data import tokenizer as tokenizer_module
from meristem.data.tokenizer import AlphabetTokenizer, RefusedSymbol, Tokenizer
from meristem.errors import ConfigError

FRAME = ("<a>", "<b>", "<c>")


@st.composite
def alphabets(draw: st.DrawFn) -> AlphabetTokenizer:
    """Letters and special symbols in any order, 0 to 2 of these before and behind a payload."""
    letters = draw(st.lists(st.sampled_from("ABCDab*-"), min_size=2, max_size=8, unique=True))
    vocab = draw(st.permutations([*letters, *FRAME]))
    frames = st.lists(st.sampled_from(FRAME), max_size=2).map(tuple)
    return AlphabetTokenizer(
        vocab=tuple(vocab),
        prefix=draw(frames),
        suffix=draw(frames),
        replace={"J": draw(st.sampled_from(letters))} if draw(st.booleans()) else {},
        refuse=draw(st.sampled_from(["", letters[0]])),
        is_case_sensitive=draw(st.booleans()),
    )


def slow_id(tokenizer: AlphabetTokenizer, symbol: str) -> int | None:
    """The id of one symbol by the rules, one after the other; None where it is refused."""
    spelled = [symbol] if tokenizer.is_case_sensitive else [symbol, symbol.upper()]
    for one in spelled:
        if one in tokenizer.replace:
            return tokenizer.vocab.index(tokenizer.replace[one])
        if one in tokenizer.vocab and one not in tokenizer.refuse:
            return tokenizer.vocab.index(one)
    return None


def differs(tokenizer: AlphabetTokenizer, texts: list[str], column: pa.Array) -> bool:
    """Whether the fast way gives another column than a loop over symbols, or another fault."""
    before, behind = ([tokenizer.vocab.index(s) for s in frame] for frame in (tokenizer.prefix, tokenizer.suffix))
    rows = []
    for row, text in enumerate(texts):
        ids = [slow_id(tokenizer, symbol) for symbol in text]
        if None in ids:
            with pytest.raises(RefusedSymbol) as caught:
                tokenizer.encode_column(column)
            found = (caught.value.row, caught.value.offset, caught.value.symbol)
            return found != (row, ids.index(None), text[ids.index(None)])
        rows.append([*before, *ids, *behind])
    fast = tokenizer.encode_column(column)
    replaced = sum(text.count(s) for text in texts for s in ("J" if tokenizer.is_case_sensitive else "Jj"))
    expected = {f"J>{new}": replaced for new in tokenizer.replace.values() if replaced}
    lengths = [len(row) for row in rows]
    return (
        fast.ids.tolist() != [i for row in rows for i in row]
        or fast.offsets.tolist() != np.cumsum([0, *lengths]).tolist()
        or fast.replaced != expected
    )


@given(
    tokenizer=alphabets(),
    texts=st.lists(st.text(alphabet="ABCDabJj*-", max_size=6), max_size=6),
    skipped=st.integers(0, 2),
    kind=st.sampled_from([pa.string(), pa.large_string(), pa.binary(), pa.large_binary()]),
)
def test_a_column_is_what_a_loop_over_symbols_gives(
    tokenizer: AlphabetTokenizer, texts: list[str], skipped: int, kind: pa.DataType
) -> None:
    column = pa.array(["#" * 3] * skipped + texts, pa.string()).cast(kind).slice(skipped)
    assert not differs(tokenizer, texts, column)


TOKENIZER = AlphabetTokenizer(vocab=("<a>", "<b>", *"ABC"), prefix=("<a>",), suffix=("<b>",), replace={"J": "B"})


def test_the_check_finds_an_encoder_that_counts_what_it_replaced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["AJJ", "", "J"]
    assert not differs(TOKENIZER, texts, pa.array(texts))
    monkeypatch.setattr(tokenizer_module, "_count", lambda text, byte: int(byte in text))
    assert differs(TOKENIZER, texts, pa.array(texts))


def test_the_check_finds_an_encoder_that_forgets_where_a_slice_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["AB", "C"]
    column = pa.array(["BBB", *texts], pa.large_string()).slice(1)
    assert not differs(TOKENIZER, texts, column)

    def from_the_first(payloads: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        text, bounds = whole(payloads)
        return np.frombuffer(payloads.buffers()[2], np.uint8)[: len(text)], bounds

    whole = tokenizer_module.column_bytes
    monkeypatch.setattr(tokenizer_module, "column_bytes", from_the_first)
    assert differs(TOKENIZER, texts, column)


def test_an_alphabet_travels_to_other_processes() -> None:
    again = pickle.loads(pickle.dumps(TOKENIZER))
    assert again == TOKENIZER
    assert again.encode("AJ").ids.tolist() == TOKENIZER.encode("AJ").ids.tolist()


def test_an_alphabet_of_more_symbols_than_a_byte_counts_is_refused() -> None:
    special = [f"<{i}>" for i in range(254)]
    assert AlphabetTokenizer(vocab=(*special, "A"), prefix=("<253>",)).encode("A").ids.tolist() == [253, 254]
    with pytest.raises(ConfigError, match=r"255 symbols at most.*got 256"):
        AlphabetTokenizer(vocab=(*special, "A", "B"))


def test_a_tokenizer_is_given_texts_as_texts_and_bytes_that_are_none_as_bytes(monkeypatch):
    """Whether a program hands them over, or a long one is counted piece by piece."""
    kinds = []

    class Seeing(AlphabetTokenizer):
        def encode_column(self, payloads):
            kinds.append(payloads.type)
            return super().encode_column(payloads)

    class Bytes:
        def __bytes__(self) -> bytes:
            return b"AB"

    tokenizer = Seeing(vocab=("A", "B"))
    assert tokenizer.encode_values(["AB", Bytes()]).ids.tolist() == [0, 1, 0, 1]
    monkeypatch.setattr(tokenizer_module, "PIECE_BYTES", 10)
    for kind in (pa.string(), pa.large_string()):
        assert Tokenizer.lengths(tokenizer, pa.array(["AB" * 12, "A"], kind)).tolist() == [24, 1]
    assert kinds == [pa.large_string(), *[pa.string()] * 4, *[pa.large_string()] * 4]
    monkeypatch.setattr(Bytes, "__bytes__", lambda self: b"A\xff")
    with pytest.raises(RefusedSymbol):
        tokenizer.encode_values([Bytes()])
    assert kinds[-1] == pa.large_binary()
