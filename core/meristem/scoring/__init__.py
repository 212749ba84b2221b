"""What a model makes of records: contacts between residues, and how likely the residues are."""
