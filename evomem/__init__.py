"""evomem: memory managers for frozen language models, found by search."""

__version__ = "0.1.0"
