"""The durable registry: adapter files in content-addressed folders, and what they are called, in SQLite beside them."""

from onebase.adapters.registry.entries import AdapterEntry, AdapterState, DeletedName, Deletion, GcReport, Import, Page
from onebase.adapters.registry.registry import Registry

__all__ = ["AdapterEntry", "AdapterState", "DeletedName", "Deletion", "GcReport", "Import", "Page", "Registry"]
