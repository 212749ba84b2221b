"""What a model is trained for: corruption, modules of its own, and a loss; one file each."""
