"""The built-in domains: each is a folder, none imports another."""
