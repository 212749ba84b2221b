"""Objectives that train on pictures: masked patches and self-distillation."""
