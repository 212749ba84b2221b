"""Sequences made by a model, token after token: prefill, then a cache that grows.

* `options.py`: what may be asked for.
* `steps.py`: the model over many sequences at once, one more token of each a step.
* `few_rows.py`: the model with its weights in the order in which a step reads them.
* `sample.py`, `beams.py`: the two loops, and from logits to a token, greedy or drawn.
* `text.py`: prompts in, texts out.
"""
