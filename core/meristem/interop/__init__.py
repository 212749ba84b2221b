"""Foreign checkpoints, in and out.

A family of models is supported when there are three things: a function that reads a foreign config into a
`TransformerConfig` (and one that writes it back), a key table, and a parity test. They stand in one file for a family
or for close kin, and make a `Family` value, which a package lists among its entry points. Nothing else asks which
family a model is of.

`directory.py` reads and writes directories by the tables and settings of a family, and `runners.py` measures how far a
model of ours is from that of the other library.

How to add a family
-------------------
A family can lie in any installed package, and no file of Meristem changes for it.

1. `read_config(config, tensors) -> TransformerConfig` and `write_config(architecture, tokenizer) -> dict`. `tensors`
   maps foreign names (as the table has them) to tensors, read when asked for; `name in tensors` costs nothing. At
   export `read_config` gets what was just written, once without the tensors (only `derived` ones) and once with
   them: everything but the pool must be the same both times. Settings that are fields of ours need one line for both:

       FIELDS = (
           *SHAPE,                                                     hidden_size and its like
           Field("dropout", ("residual.dropout", "embedding.dropout"), 0.1),
           activation("hidden_act", "gelu"),
       )
       Settings("a LabBERT", config, FIELDS).build(position=Rotary(), norm=RMSNorm)
       {"model_type": "lab-bert", **write_fields(architecture, FIELDS)}
2. A `KeyTable` (or a function of our config that gives one). A row says one tensor or module of ours:

       *block_rows("h.{}", attention_norm="ln_1", qkv=(q, k, v), up="mlp.c_fc")  parts of a block; `{}`: the layer
       *head_rows(out="lm_head")                                                 parts of the symbol head
       Rename("trunk.final_norm", "transformer.ln_f")                            weight and bias, if there is one
       Transposed("trunk.blocks.{}.feedforward.up", "h.{}.mlp.c_fc")             a matrix kept the other way round
       Row(own, (gate, value), joined(2))                                        gate rows, then value rows
       Row("trunk.blocks.{}.experts.up", ("..{}.experts.expert_{expert}.wi.weight",), STACKED)
       Row(own, foreign, Transform(read, write))                                 anything else

   `Transform.read(tensors, config) -> tensor` runs on the meta device first (shapes are checked before anything is
   read), so it must not look at values; `write(tensor, config)` gives one tensor a foreign name, or None for a name
   that another row writes (a class token with its position folded in reads `pos_embed` and leaves its writing to the
   row of positions). A parameter without module has its full name on both sides
   (`trunk.blocks.{}.attention_scale` and `blocks.{}.ls1.gamma`). `Tied` and `Ignored` say what needs no row.
3. A `Family` value, by `sequence_family` where it is like most in `transformers`: `read_heads`
   (`heads_by_prefix(tokens="lm_head.")`, or `symbols_by_class("GPT2LMHeadModel")` where a tied head has no tensor; a
   `Readout` for a label, rows `heads.<label>.out`), `write_readouts` for labels, `spellings` for other names of the
   same tensors, `prefix` of a trunk within a whole model, `name_class` for `architectures`, `library` for what is not
   `transformers` (an entry point of `meristem.libraries`), and a `runner`: `SEQUENCES`, `PAIRS` of `runners.py`, or
   `replace(SEQUENCES, theirs=run_sequences(pooled="pooler_output"))`. A family whose config another one recognises
   too, or that can say models of another one, is a `variant` of that one.
4. An entry point in the package's `pyproject.toml`, and a parity test (`tests/references.py` and
   `tests/parity_checks.py` help):

       [project.entry-points."meristem.families"]
       lab-bert = "lab_models.bert:LAB_BERT"
"""
