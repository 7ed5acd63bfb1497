"""CLI: ``evomem`` in a terminal."""
