"""Families that several domains share: a file for each, or for close kin."""
