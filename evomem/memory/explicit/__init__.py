"""Memory: explicit memories, which a model reads and writes beside its attention, as layers of a cache."""
