"""Memory: the KV cache of a transformers model as slots, each of which remembers the token that it holds."""
