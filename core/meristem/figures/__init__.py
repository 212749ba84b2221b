"""Figures of results, as PNG files."""
