"""Read and write the tokenizer files of other libraries' model directories; ids stay the same.

`tokenizer.json` is the tokenizer where there is one. Older directories hold vocabulary files, from which the same is
built as their own library builds it (`vocabulary_files`). What the other files say is added as that library adds it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meristem.data.subwords import ROLES, SubwordTokenizer
from meristem.data.tokenizer import Tokenizer
from meristem.errors import CheckpointError, ConfigError
from meristem.interop import vocabulary_files as files

SPECIAL_MAP, ADDED = "special_tokens_map.json", "added_tokens.json"

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""How a symbol of `added_tokens` is found in a text."""

Definition = dict[str, Any]
"""`tokenizer.json` as an object."""


def read_subwords(folder: Path, config: Mapping[str, Any]) -> tuple[SubwordTokenizer, list[str]]:
    """Read a subword tokenizer from a directory of another library; also returns notes for the user.

    Args:
        config: the directory's `config.json`; `vocab_size` bounds the ids, and `pad_token_id` and its like name special
            symbols that no file of the tokenizer names.

    Raises:
        CheckpointError: no file of a tokenizer, or one that is damaged or does not go with the others.
        ConfigError: the library for it is not installed.
    """
    settings = files.read_object(folder / files.SETTINGS)
    file, definition, notes = files.read_definition(folder, settings)
    try:
        vocab = _vocab_of(definition)
        roles = _read_roles(folder, settings, config, definition, vocab)
        notes += _add_symbols(file, definition, vocab, roles, _read_added(folder, settings), config.get("vocab_size"))
        _apply(definition, settings)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{file} must be as the tokenizers library writes it: {reason}") from error
    special = {role: token["content"] for role, token in roles.items()}
    try:
        tokenizer = SubwordTokenizer(json.dumps(definition, ensure_ascii=False), special)
        # a definition says itself what is put around a text, and the other library heeds no setting against it
        return tokenizer if file.name == files.DEFINITION else _with_frame(tokenizer, definition, settings), notes
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


def write_subwords(tokenizer: Tokenizer) -> dict[str, str]:
    """Texts of the files of a subword tokenizer, by file name.

    Raises:
        ConfigError: a tokenizer of another kind.
    """
    if not isinstance(tokenizer, SubwordTokenizer):
        raise ConfigError(f"a tokenizer must be one of subwords to be written as one; got one of {tokenizer.kind}")
    names = {f"{role}_token": symbol for role, symbol in tokenizer.special.items()}
    settings = {**names, "clean_up_tokenization_spaces": False, "tokenizer_class": files.CLASS}
    return {
        files.DEFINITION: json_text(json.loads(tokenizer.definition)),
        files.SETTINGS: json_text(settings),
        SPECIAL_MAP: json_text(names),
    }


def _vocab_of(definition: Definition) -> dict[str, int]:
    """Ids of the model's symbols and of those added to it."""
    vocab = definition["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    if not all(isinstance(i, int) for i in ids.values()):
        raise ValueError("model.vocab gives no integer for each symbol")
    definition["added_tokens"] = list(definition.get("added_tokens") or [])
    return {**ids, **{token["content"]: token["id"] for token in definition["added_tokens"]}}


def _read_roles(
    folder: Path,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    definition: Definition,
    vocab: Mapping[str, int],
) -> dict[str, dict[str, Any]]:
    """Special symbols by role: as the files name them, else by convention, else as the config numbers them."""
    stated = {**files.read_object(folder / SPECIAL_MAP), **settings}
    roles = {role: symbol_of(folder, stated[f"{role}_token"]) for role in ROLES if stated.get(f"{role}_token")}
    usual = files.usual_roles(settings, vocab, has_roles=bool(roles))
    for role, symbol in usual.items():
        if f"{role}_token" not in stated and symbol in vocab:
            roles[role] = symbol_of(folder, symbol)
    called = {token["id"]: token["content"] for token in definition["added_tokens"] if token.get("special")}
    for role in ROLES:
        number = config.get(f"{role}_token_id")
        # one that is special already: the config must not change how a text is cut
        if role not in roles and f"{role}_token" not in stated and isinstance(number, int) and number in called:
            roles[role] = symbol_of(folder, called[number])
    return roles


def _read_added(folder: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Symbols that files beside the vocabulary add to it, in the order of the ids that they are said to have."""
    found = {symbol: (number, {"content": symbol}) for symbol, number in files.read_object(folder / ADDED).items()}
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        symbol = symbol_of(folder, token)
        found[symbol["content"]] = (int(number), symbol)
    return [token for _, token in sorted(found.values(), key=lambda pair: pair[0])]


def _add_symbols(
    file: Path,
    definition: Definition,
    vocab: dict[str, int],
    roles: dict[str, dict[str, Any]],
    added: list[dict[str, Any]],
    vocab_size: int | None,
) -> list[str]:
    """Add symbols to a definition, as far as a model of `vocab_size` has room for them; returns notes on the others."""
    tokens = {token["content"]: token for token in definition["added_tokens"]}
    names_of_roles = {token["content"] for token in roles.values()}
    for token in (*added, *roles.values()):
        symbol = token["content"]
        is_special = symbol in names_of_roles or bool(token.get("special", False))
        if symbol in tokens:  # how it is found in a text is said already
            tokens[symbol]["special"] = tokens[symbol].get("special", False) or is_special
            continue
        vocab.setdefault(symbol, max(vocab.values(), default=-1) + 1)
        flags = {**dict.fromkeys(FLAGS, False), **{flag: bool(token[flag]) for flag in FLAGS if flag in token}}
        tokens[symbol] = {"id": vocab[symbol], "content": symbol, **flags, "special": is_special}
    outside = {symbol for symbol, i in vocab.items() if vocab_size is not None and i >= vocab_size}
    if own := sorted(outside - set(tokens)):
        most = max(vocab[symbol] for symbol in own) + 1
        raise CheckpointError(f"{file}: vocab_size must be {most} or more in config.json; got {vocab_size}")
    for role in [role for role, token in roles.items() if token["content"] in outside]:
        del roles[role]
    # in the order of their ids: the library numbers what is new in the order of the list
    kept = [token for symbol, token in tokens.items() if symbol not in outside]
    definition["added_tokens"] = sorted(kept, key=lambda token: token["id"])
    names = ", ".join(repr(symbol) for symbol in sorted(outside))
    return [f"symbols that the model has no row for are left out of the tokenizer: {names}"] if outside else []


def _apply(definition: Definition, settings: Mapping[str, Any]) -> None:
    """What the settings say about cases, accents and spaces goes before the definition."""
    names = {
        "do_lower_case": "lowercase",
        "strip_accents": "strip_accents",
        "tokenize_chinese_chars": "handle_chinese_chars",
    }
    for part in _parts(definition.get("normalizer"), "normalizers"):
        if part["type"] == "BertNormalizer":
            part.update({field: settings[name] for name, field in names.items() if name in settings})
    for part in _parts(definition.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] == "ByteLevel" and isinstance(settings.get("add_prefix_space"), bool):
            part["add_prefix_space"] = settings["add_prefix_space"]


def _parts(part: dict[str, Any] | None, names: str) -> list[dict[str, Any]]:
    """A part of a definition, or the parts of a sequence of them."""
    if part is None:
        return []
    return [inner for one in part[names] for inner in _parts(one, names)] if part["type"] == "Sequence" else [part]


def _with_frame(tokenizer: SubwordTokenizer, definition: Definition, settings: Mapping[str, Any]) -> SubwordTokenizer:
    """With the symbols around a text that the settings ask for, where they say a word about it."""
    if "add_bos_token" not in settings and "add_eos_token" not in settings:
        return tokenizer
    before, behind = (tokenizer.special.get(r) if settings.get(f"add_{r}_token") else None for r in ("bos", "eos"))
    wanted = [tokenizer.vocab.index(symbol) for symbol in (before, behind) if symbol]
    if tokenizer.encode("").ids.tolist() == wanted:
        return tokenizer
    ids = {symbol: tokenizer.vocab.index(symbol) for symbol in (before, behind) if symbol}
    framed = {**definition, "post_processor": files.frame(before, behind, ids)}
    return SubwordTokenizer(json.dumps(framed, ensure_ascii=False), tokenizer.special)


def symbol_of(folder: Path, value: Any) -> dict[str, Any]:
    """A special symbol as an object with `content`, whether a file gives it so or by name.

    Raises:
        CheckpointError: it is neither.
    """
    token = {"content": value} if isinstance(value, str) else value
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise CheckpointError(
            f"{folder / files.SETTINGS}: a special symbol must be a name or have content; got {value!r}"
        )
    return token


def json_text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
