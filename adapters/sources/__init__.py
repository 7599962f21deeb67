"""Where an adapter's files come from, besides an upload: folders, the Hugging Face Hub, object stores, https."""

from onebase.adapters.sources.folder import allowed_folder
from onebase.adapters.sources.options import SourceOptions

__all__ = ["SourceOptions", "allowed_folder"]
