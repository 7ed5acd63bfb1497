"""Model: a frozen causal language model, loaded by alias, local folder or hub id."""

from evomem.models.aliases import Alias, aliases
from evomem.models.loading import LoadedModel, ModelInfo, available, load
from evomem.models.pretrained.files import cache_root, folder_digest

__all__ = ["Alias", "LoadedModel", "ModelInfo", "aliases", "available", "cache_root", "folder_digest", "load"]
