"""Learns the vocabulary from the sample: `python -m field_notes.learn` writes `vocabulary.json` anew."""

from field_notes import FOLDER, NUM_SYMBOLS, SPECIAL


def learn() -> str:
    """Text of `vocabulary.json`: byte pairs of words, in lower case and without accents."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    learned = Tokenizer(models.BPE(unk_token=SPECIAL["unk"], end_of_word_suffix="</w>"))
    learned.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    learned.pre_tokenizer = pre_tokenizers.Whitespace()
    learned.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_SYMBOLS, special_tokens=list(SPECIAL.values()), end_of_word_suffix="</w>", show_progress=False
    )
    learned.train_from_iterator((FOLDER / "notes.txt").read_text("utf-8").splitlines(), trainer)
    frame = {symbol: learned.token_to_id(symbol) for symbol in (SPECIAL["cls"], SPECIAL["sep"])}
    learned.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=list(frame.items()))
    return learned.to_str(pretty=True)


if __name__ == "__main__":
    (FOLDER / "vocabulary.json").write_text(learn(), encoding="utf-8")
