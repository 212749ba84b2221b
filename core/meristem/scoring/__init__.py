"""What a model makes of records: contacts between residues, how likely they are, and where it looks."""
