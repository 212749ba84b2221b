"""Small tokenizers of each kind, trained on the README by the `tokenizers` library, and texts to try them on."""

from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

README = Path(__file__).resolve().parents[1] / "README.md"
KINDS = ("word pieces", "byte pairs", "framed byte pairs", "unigrams", "byte fallback", "regex byte pairs")
BYTE_KINDS = ("byte pairs", "framed byte pairs", "regex byte pairs")
"""Whose decoding gives back the very text."""

REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen2 cuts."""


@cache
def trained(kind: str) -> Tokenizer:
    """A tokenizer of 320 to 500 symbols; not to be changed."""
    corpus = README.read_text("utf-8").splitlines()
    if kind == "word pieces":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        made.train_from_iterator(
            corpus, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
        )
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    elif kind == "unigrams":
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
        )
        made.decoder = decoders.Metaspace()
        sentinels = [f"<extra_id_{i}>" for i in range(4)]
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        )
        made.train_from_iterator(corpus, trainer)
        made.add_special_tokens(sentinels)
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    elif kind == "byte fallback":
        made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        made.decoder = decoders.Sequence(steps)
        special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
        made.train_from_iterator(corpus, trainer)
        made = _plain_bytes(made)
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if kind == "regex byte pairs":
            made.normalizer = normalizers.NFC()
            cut = pre_tokenizers.Split(_pattern(), "isolated")
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            made.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
        made.decoder = decoders.ByteLevel()
        special = ["<|endoftext|>"]
        if kind == "framed byte pairs":
            special = ["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True, special=True)]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=380, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        made.train_from_iterator(corpus, trainer)
        if kind == "framed byte pairs":
            made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), True, False)
    return made


def _pattern() -> object:
    from tokenizers import Regex

    return Regex(REGEX)


def _plain_bytes(made: Tokenizer) -> Tokenizer:
    """Without bytes among the added symbols, where no published tokenizer has them."""
    import json

    values = json.loads(made.to_str())
    values["added_tokens"] = values["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(values))


def random_texts(rng: np.random.Generator, count: int = 60) -> list[str]:
    """Texts of README words, of letters of many scripts, emoji, spaces and special symbols; some are empty or long."""
    words = README.read_text("utf-8").split()
    odd = [*"\u00e9\u00df\u0130\u03a9\u4e2d\u6587\u0e01\u05d0\ud55c\u2581\u00a0\u2028", "e\u0301", "\ufb01", "\u1e9e"]
    odd += ["\U0001f642", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\t", "\n\n", "   ", "\r\n", "'s", "3.14", "``"]
    special = ["[MASK]", "<mask>", "<s>", "</s>", "<|endoftext|>", "<extra_id_2>", "[SEP]", "<pad>", "[UNK]", "<unk>"]
    texts = ["", " ", "\n", "a", "A", "\U0001f642", "Caf\u00e9 NA\u00cfVE", " leading", "trailing ", "x" * 300]
    for _ in range(count - len(texts)):
        parts: list[str] = []
        for _ in range(int(rng.integers(1, 60))):
            pool = (words, odd, special)[rng.choice(3, p=[0.7, 0.25, 0.05])]
            parts += [pool[rng.integers(len(pool))], "" if rng.random() < 0.3 else " "]
        text = "".join(parts)
        texts.append(text.upper() if rng.random() < 0.1 else text)
    texts.append(" ".join(texts) * 3)
    return texts
