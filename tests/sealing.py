"""Sealed files taken apart: header and tensors, to be changed and sealed again, or written without a seal."""

import json

from safetensors import safe_open
from safetensors.torch import load


def parts(path):
    """(header without its digests, tensors) of a file."""
    with safe_open(path, "pt") as handle:
        content = {k: handle.get_tensor(k) for k in handle.keys()}  # noqa: SIM118 - a handle is no dict
        return _header(handle.metadata()), content


def of_payload(payload):
    """The same of bytes."""
    size = int.from_bytes(payload[:8], "little")
    return _header(json.loads(payload[8 : 8 + size])["__metadata__"]), load(payload)


def _header(metadata):
    header = json.loads(metadata["kvcondense"])
    del header["digest"], header["tensors"]
    return header
