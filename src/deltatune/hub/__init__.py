"""Hubs of deltas: a folder or any URL of fsspec, by name, tag and content."""

from deltatune.hub.entry import Entry
from deltatune.hub.hub import Hub, local_store
from deltatune.hub.reference import Reference

__all__ = ["Entry", "Hub", "Reference", "local_store"]
