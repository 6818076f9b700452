"""Sharing networks: a folder of weights, config and card, here or on the Hugging Face hub."""

from spem.hub.folder import Shared, from_pretrained, read_shared, save_pretrained
from spem.hub.remote import push_to_hub
from spem.hub.runs import share_run

__all__ = [
    "Shared",
    "from_pretrained",
    "push_to_hub",
    "read_shared",
    "save_pretrained",
    "share_run",
]
