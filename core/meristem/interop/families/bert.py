"""BERT (Devlin 2019, arXiv 1810.04805) and RoBERTa (Liu 2019, arXiv 1907.11692), whose positions begin further on.

As Hugging Face keeps them (`BertForPreTraining`, `BertForMaskedLM`, `BertModel`, `RobertaForMaskedLM` and so on):
post-norm, biases everywhere, a learned table of positions and one of token types, a norm of the embedding; the
pooler is the first row, a linear map and tanh, and BERT's label `next_sentence` is predicted from it.
"""

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any

from meristem.data.tokenizer import Tokenizer
from meristem.errors import require
from meristem.interop.family import (
    TENSORFLOW_SPELLINGS,
    Family,
    ForeignConfig,
    Tensors,
    classes_by_head,
    heads_by_prefix,
    of_type,
)
from meristem.interop.runners import SEQUENCES, run_sequences
from meristem.interop.settings import COMMON, Field, Settings, activation, special_ids, write_fields
from meristem.interop.table import Ignored, KeyTable, Rename, Row, Tied, block_rows, head_rows, lm_head_rows
from meristem.model.config import Embedding, Learned, Prefix, Residual, TokenHead, TransformerConfig
from meristem.model.heads import Readout
from meristem.model.model import SYMBOLS

NEXT_SENTENCE = Readout(name="next_sentence", classes=("next", "random"), pool=None)
"""Whether the second sentence follows the first, in the order of the reference's logits."""

SYMBOL_HEAD = heads_by_prefix(tokens="cls.predictions.")

FIELDS = (
    *COMMON,
    activation("hidden_act", "gelu"),
    Field("hidden_dropout_prob", ("residual.dropout", "embedding.dropout"), 0.1),
    Field("attention_probs_dropout_prob", "attention.dropout", 0.1),
    Field("max_position_embeddings", "position.max_positions", 512, absent=512),
    Field("type_vocab_size", "embedding.token_types", 2),
    Field("layer_norm_eps", "norm.eps", 1e-12),
)

PLAIN = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}
"""Settings that must have these values."""


def trunk_rows(prefix: str, positions: bool = True) -> tuple[Row, ...]:
    """Rows for embedding and pooler, which BERT and its relatives share; `prefix` is that of the trunk's names."""
    table = (Rename("trunk.embedding.position.table", f"{prefix}embeddings.position_embeddings"),)
    return (
        Rename("trunk.embedding.symbols", f"{prefix}embeddings.word_embeddings"),
        *(table if positions else ()),
        Rename("trunk.embedding.types", f"{prefix}embeddings.token_type_embeddings"),
        Rename("trunk.embedding.norm", f"{prefix}embeddings.LayerNorm"),
        Rename("pool.dense", f"{prefix}pooler.dense"),
    )


def _rows(prefix: str) -> tuple[Row, ...]:
    layer = f"{prefix}encoder.layer.{{}}"
    return (
        *trunk_rows(prefix),
        *block_rows(
            f"{layer}.attention",
            attention_norm="output.LayerNorm",
            qkv=("self.query", "self.key", "self.value"),
            out="output.dense",
        ),
        *block_rows(layer, feedforward_norm="output.LayerNorm", up="intermediate.dense", down="output.dense"),
    )


def prediction_rows(bias: str) -> tuple[Row, ...]:
    """Rows for BERT's symbol head; `bias` is the tensor that is kept, another one repeats it."""
    head = "cls.predictions"
    return head_rows(
        dense=f"{head}.transform.dense", norm=f"{head}.transform.LayerNorm", out=f"{head}.decoder", bias=bias
    )


EMBEDDING, DECODER = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder"

TABLE = KeyTable(
    rows=(
        *_rows("bert."),
        *prediction_rows(bias="cls.predictions.bias"),
        Rename("heads.next_sentence.out", "cls.seq_relationship"),
    ),
    tied=(Tied(f"{DECODER}.weight", EMBEDDING), Tied(f"{DECODER}.bias", "cls.predictions.bias")),
    ignored=(Ignored(r"bert\.embeddings\.position_ids"),),
)

ROBERTA_TABLE = KeyTable(
    rows=(
        *_rows("roberta."),
        *lm_head_rows(bias="lm_head.bias"),
    ),
    tied=(
        Tied("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
        Tied("lm_head.decoder.bias", "lm_head.bias"),
    ),
    ignored=(Ignored(r"roberta\.embeddings\.(position_ids|token_type_ids)"),),
)


def read_config(config: ForeignConfig, tensors: Tensors) -> TransformerConfig:
    found = Settings("a BERT", config, FIELDS)
    # the head has the activation of the trunk
    head = partial(TokenHead, activation=found.choice("hidden_act"))
    found.require(**PLAIN)
    return read_post_norm(found, tensors, position=Learned, head=head)


def read_roberta_config(config: ForeignConfig, tensors: Tensors) -> TransformerConfig:
    found = Settings("a RoBERTa", config, FIELDS, {"pad_token_id": 1})
    pad = found["pad_token_id"]
    require(isinstance(pad, int), "pad_token_id must be set in a RoBERTa config", repr(pad))
    found.require(**PLAIN)
    return read_post_norm(found, tensors, "roberta.", position=partial(Learned, offset=pad + 1))


def read_post_norm(found: Settings, tensors: Tensors, prefix: str = "bert.", **parts: Any) -> TransformerConfig:
    """Build a post-norm encoder from the settings of BERT; `parts` as in `Settings.build`."""
    return found.build(
        embedding=partial(Embedding, is_normed=True),
        residual=partial(Residual, placement="after"),
        final_norm=False,
        pool=Prefix(is_dense=True) if f"{prefix}pooler.dense.weight" in tensors else None,
        **parts,
    )


def write_config(architecture: TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {"model_type": "bert", **write_fields(architecture, FIELDS), **special_ids(tokenizer)}


def write_roberta_config(architecture: TransformerConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    position = architecture.position
    # padding stands before the first position
    pad = position.offset - 1 if isinstance(position, Learned) else 1
    ids = special_ids(tokenizer)
    own = ids["pad_token_id"]
    require(own in (None, pad), "positions must begin behind the padding symbol", f"{pad + 1} and {own}")
    return {"model_type": "roberta", **write_fields(architecture, FIELDS), **ids, "pad_token_id": pad}


def read_heads(config: ForeignConfig, names: Collection[str]) -> tuple[str | Readout, ...]:
    """The symbol head and the next-sentence label, those that the checkpoint has."""
    label = (NEXT_SENTENCE,) if "cls.seq_relationship.weight" in names else ()
    return (*SYMBOL_HEAD(config, names), *label)


def _name_class(heads: Collection[str]) -> str:
    if NEXT_SENTENCE.name in heads:
        return "BertForPreTraining" if SYMBOLS in heads else "BertForNextSentencePrediction"
    return "BertForMaskedLM" if SYMBOLS in heads else "BertModel"


BERT = Family(
    name="BERT",
    domain="text",
    recognises=of_type("bert"),
    read_config=read_config,
    write_config=write_config,
    table=TABLE,
    read_heads=read_heads,
    spellings=TENSORFLOW_SPELLINGS,
    prefix="bert.",
    name_class=_name_class,
    runner=replace(
        SEQUENCES,
        theirs=run_sequences(
            logits=("logits", "prediction_logits"), next_sentence="seq_relationship_logits", pooled="pooler_output"
        ),
    ),
)

ROBERTA = BERT.variant(
    name="RoBERTa",
    recognises=of_type("roberta", "xlm-roberta", "camembert"),  # they differ in their vocabulary alone
    read_config=read_roberta_config,
    write_config=write_roberta_config,
    table=ROBERTA_TABLE,
    read_heads=heads_by_prefix(tokens="lm_head."),
    prefix="roberta.",
    name_class=classes_by_head("RobertaForMaskedLM", "RobertaModel"),
    runner=replace(SEQUENCES, theirs=run_sequences(pooled="pooler_output")),
)
