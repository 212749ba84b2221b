"""Figures as PNG files: what they share, and those that more than one verb draws."""
