"""Foreign checkpoints, in and out.

A family of models is at home when it is three things: a function that reads a foreign config into a
`TransformerConfig` (and one that writes it back), a key table, and a parity test. They stand in one file a
family, named in `families.py`; nothing else asks which family a model is of.

* `table.py`: rows of a key table, read and written by one engine, strictly both ways.
* `weights.py`: tensors of a directory, in safetensors or `.bin`, whole or in shards.
* `family.py`: what a family is.
* `directory.py`: a Hugging Face directory to a model, and back.
* `parity.py`: the same input through both libraries, and the largest difference.
"""
