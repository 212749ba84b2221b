"""Read and write k-mer vocabularies of other libraries' model directories; ids stay the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meristem.data.subwords import ROLES
from meristem.data.tokenizer import Tokenizer
from meristem.errors import CheckpointError, ConfigError
from meristem.interop.vocabulary import SPECIAL, json_text, symbol_of
from meristem.interop.vocabulary_files import SETTINGS, WORDS, read_lines, read_object
from meristem_domains.dna.kmers import KmerTokenizer


def read_kmers(folder: Path, config: Mapping[str, Any]) -> tuple[KmerTokenizer, list[str]]:
    """Read a k-mer tokenizer from `vocab.txt` of a directory of another library; also returns notes for the user.

    Raises:
        CheckpointError: no vocabulary, or one that is damaged or larger than `vocab_size`.
    """
    file = folder / WORDS
    vocab = read_lines(file)
    stated = {**read_object(folder / SPECIAL), **read_object(folder / SETTINGS)}
    named = {role: symbol_of(folder, stated.get(f"{role}_token") or f"<{role}>")["content"] for role in ROLES}
    special = {role: symbol for role, symbol in named.items() if symbol in vocab}
    if "cls" not in special:
        raise CheckpointError(f"{file} must hold {named['cls']}, which begins each sequence; it does not")
    if len(vocab) > config.get("vocab_size", len(vocab)):
        raise CheckpointError(f"{file}: vocab_size must be {len(vocab)} or more; got {config['vocab_size']}")
    # of these models, none was trained with an end; a directory has one only where it says so
    suffix = (special["eos"],) if stated.get("eos_token") and "eos" in special else ()
    try:
        tokenizer = KmerTokenizer(tuple(vocab), (special["cls"],), suffix, special)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return tokenizer, ["lower case is read as upper case, U as T, and each letter but A, C, G and T as one N"]


def write_kmers(tokenizer: Tokenizer) -> dict[str, str]:
    """Texts of the files of a k-mer tokenizer, by file name.

    Raises:
        ConfigError: a tokenizer of another kind, or one that puts around a sequence what the files cannot say.
    """
    if not isinstance(tokenizer, KmerTokenizer):
        raise ConfigError(f"a tokenizer must be one of k-mers to be written as one; got one of {tokenizer.kind}")
    special = dict(tokenizer.special)
    if tokenizer.prefix != (special.get("cls"),) or tokenizer.suffix not in ((), (special.get("eos"),)):
        raise ConfigError(
            "a tokenizer of k-mers must put cls before a sequence, and eos or nothing behind it, to be written; "
            f"got {tokenizer.prefix} and {tokenizer.suffix}"
        )
    names: dict[str, str | None] = {f"{role}_token": symbol for role, symbol in special.items()}
    if not tokenizer.suffix:
        names["eos_token"] = None
    # the foreign class splits at spaces and at symbols of its vocabulary, and takes the longest that fits
    settings = {**names, "clean_up_tokenization_spaces": False, "tokenizer_class": "EsmTokenizer"}
    stated = {name: symbol for name, symbol in names.items() if symbol}
    return {WORDS: "\n".join(tokenizer.vocab), SETTINGS: json_text(settings), SPECIAL: json_text(stated)}
