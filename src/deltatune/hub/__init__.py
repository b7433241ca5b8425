"""Hubs of deltas: a folder, any URL of fsspec, an OCI image layout or the Hugging Face Hub."""

from deltatune.hub.entry import Entry
from deltatune.hub.hub import Hub, local_store
from deltatune.hub.reference import Reference
from deltatune.hub.signing import check_signed, make_key, sign, signers
from deltatune.hub.site import write_site

__all__ = [
    "Entry",
    "Hub",
    "Reference",
    "check_signed",
    "local_store",
    "make_key",
    "sign",
    "signers",
    "write_site",
]
