"""Where an adapter's files come from, besides an upload: folders, the Hugging Face Hub, object stores, https."""

from onebase.adapters.sources.folder import allowed_folder
from onebase.adapters.sources.intake import Limits
from onebase.adapters.sources.options import SourceOptions
from onebase.adapters.sources.sources import Fetched, Sources

__all__ = ["Fetched", "Limits", "SourceOptions", "Sources", "allowed_folder"]
