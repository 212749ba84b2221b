"""Reading files: the contract of a domain's reader, opening sources, and tables."""
