"""Manager: how a manager is read from a plug-in and written as one, under the names of transformers' models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from huggingface_hub import PyTorchModelHubMixin

from evomem.errors import ConfigError, PluginError

if TYPE_CHECKING:
    from evomem.managers.base import MemoryManager


class PretrainedMixin(PyTorchModelHubMixin):
    """The methods of huggingface_hub's mixin, over evomem's plug-ins; part of every manager.

    The mixin's own would read config.json before anything is checked, take pickles, and write a configuration and a
    card that are not ours; what stays of it is how a folder is pushed.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **options: Any,
    ) -> Self:
        """Return the manager of a plug-in: a folder, or a repository on the hub (``owner/name``).

        Parameters
        ----------
        force_download, token, cache_dir, local_files_only, revision : for the hub, see `evomem.plugins.load`.
        **options : options to change, for example ``budget=128``; see `with_options`.

        Raises
        ------
        PluginError : there is none, it is damaged, or it holds another kind of manager than this class.
        """
        from evomem.plugins import load

        manager = load(
            pretrained_model_name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        if not isinstance(manager, cls):
            raise PluginError(
                f"{pretrained_model_name_or_path}: config.json: manager: {manager.name!r} is no {cls.__name__}; "
                "MemoryManager.from_pretrained loads any kind"
            )
        return manager.with_options(**options).requires_grad_(False) if options else manager

    def save_pretrained(
        self, save_directory: str | Path, *, repo_id: str | None = None, push_to_hub: bool = False, **hub: Any
    ) -> str | None:
        """Write the manager as a plug-in folder, with its provenance (`evomem.plugins.save` takes another).

        Parameters
        ----------
        push_to_hub : also push it, to ``repo_id`` (by default named like the folder); ``hub`` is for `push_to_hub`.

        Returns
        -------
        The commit's address if it was pushed.
        """
        from evomem.plugins import save

        if hub.pop("config", None) is not None or hub.pop("model_card_kwargs", None) is not None:
            raise ConfigError("save_pretrained: config and model_card_kwargs: a plug-in's are made from the manager")
        save(cast("MemoryManager", self), save_directory)
        return self.push_to_hub(repo_id or Path(save_directory).name, **hub) if push_to_hub else None

    def push_to_hub(self, repo_id: str, **hub: Any) -> str:
        """Push the manager to a repository on the hub, which is made if there is none; return the commit's address.

        Parameters
        ----------
        **hub : commit_message, private, token, branch, create_pr, … of ``huggingface_hub``'s ``push_to_hub``.

        Raises
        ------
        PluginError : the hub refuses, or cannot be reached; the hub client's own error is its cause.
        """
        from evomem.plugins.hub import telling

        with telling(repo_id):
            return super().push_to_hub(repo_id, **hub)
