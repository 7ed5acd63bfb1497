"""evomem: memory managers for frozen language models, found by search."""

from evomem.installing import warn_of_namesake

__version__ = "0.1.0"

warn_of_namesake()
