"""Manager: published heuristics, one paper a file."""
