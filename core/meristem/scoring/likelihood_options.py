"""Options of the likelihood. They are shown by `meristem score --help`, so nothing that takes long is imported here."""

from dataclasses import dataclass

from meristem.scoring.scorer import option


@dataclass(frozen=True, kw_only=True)
class LikelihoodOptions:
    """What is asked for; each option is for some kinds of model and refused for others.

    Attributes:
        one_pass: take the probability of each token given the whole sequence, itself included (the wild-type marginal
            of Meier 2021, doi 10.1101/2021.07.09.450648). It approximates the pseudo-log-likelihood, which runs a
            sequence of n tokens n times. (The one-pass estimate of Kantroo 2024, arXiv 2407.07265, adds a regression
            that is trained for it, and is not this.)
        prefix_tokens: payload tokens of the prefix, which are read and not scored.
        start_id: the symbol that the decoder reads first; None for the padding symbol, or 0 where there is none, as in
            training.
    """

    one_pass: bool = option(False, "bidirectional models: run each record once, without masks (wild-type marginal)")
    closing: bool = option(False, "causal models and encoder-decoders: score the special tokens behind a record too")
    prefix_tokens: int | None = option(None, "prefix language models: tokens of the prefix, which are not scored")
    start_id: int | None = option(None, "encoder-decoders: id of the symbol that the decoder reads first")
