"""Foreign checkpoints, in and out.

A family of models is at home when it is three things: a function that reads a foreign config into a
`TransformerConfig` (and one that writes it back), a key table, and a parity test. They stand in one file a
family or close kin, named in `families.py`; nothing else asks which family a model is of.

* `weights.py`: tensors of a directory, in safetensors or `.bin`, whole or in shards, each read when it is asked for.
* `table.py`: rows of a key table, read and written by one engine, strictly both ways.
* `settings.py`: settings of a foreign config, read or refused.
* `family.py`: what a family is.
* `runners.py`: how the same random input goes through ours and through the reference.
* `directory.py`: a foreign directory to a model, and back.
* `parity.py`: the largest difference of the two, by layer and output.
* `image_rows.py`, `image_labels.py`, `image_processor.py`, `image_runners.py`: what families of images share.

How to add a family
-------------------
1. `read_config(config, tensors) -> TransformerConfig` and `write_config(architecture, tokenizer) -> dict`. `tensors`
   maps foreign names (as the table has them) to tensors, read when asked for; `name in tensors` costs nothing. At
   export `read_config` gets what was just written, once without the tensors (only `derived` ones) and once with
   them: everything but the pool must be the same both times.
2. A `KeyTable` (or a function of our config that gives one). A row says one tensor or module of ours:

       Rename("trunk.final_norm", "transformer.ln_f")                       weight and bias, if there is one
       Transposed("trunk.blocks.{}.feedforward.up", "h.{}.mlp.c_fc")        `{}`: the layer
       FuseHeads("trunk.blocks.{}.attention.qkv", q, k, v)                  three foreign modules
       Row(own, (gate, value), joined(2))                                   gate rows, then value rows
       Row(own, (fused,), SWAPPED)                                          the same halves in the other order
       Row("trunk.blocks.{}.experts.up", ("..{}.experts.expert_{expert}.wi.weight",), STACKED)
       Row(own, foreign, Transform(read, write))                            anything else

   `Transform.read(tensors, config) -> tensor` runs on the meta device first (shapes are checked before anything is
   read), so it must not look at values; `write(tensor, config)` gives one tensor a foreign name, or None for a name
   that another row writes (a class token with its position folded in reads `pos_embed` and leaves its writing to the
   row of positions). A parameter without module has its full name on both sides
   (`trunk.blocks.{}.attention_scale` and `blocks.{}.ls1.gamma`). `Tied`, `Ignored` and `Constant` say what needs no
   row.
3. A `Family` value: `read_heads` (`heads_by_prefix(tokens="lm_head.")`, or `symbols_by_class("GPT2LMHeadModel")` where
   a tied head has no tensor), `read_readouts` / `write_readouts` for label heads (rows `heads.<label>.out`),
   `spellings` for other names of the same tensors, `prefix` of a trunk within a whole model, `name_class` for
   `architectures`, `library="timm"` for what is not `transformers`, and a `runner`: `SEQUENCES`, `PAIRS`
   of `runners.py`, those of `image_runners.py`, or `replace(SEQUENCES, theirs=run_sequences(pooled="pooler_output"))`.
4. A line in `families.py`, and a parity test in `tests/interop` with `references.py` and `parity_checks.py`.
"""
