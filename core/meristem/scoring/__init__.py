"""Scores of records: the likelihood that every model of symbols has, and what a domain's own scorers are."""
