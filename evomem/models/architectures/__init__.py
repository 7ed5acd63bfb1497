"""Model: architectures of our own, each a ``PreTrainedModel``."""
