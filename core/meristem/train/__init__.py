"""Training: with `cli`, the only place that knows Lightning."""
