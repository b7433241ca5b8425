"""Signatures: who vouches for a delta.

A signature is a file beside the delta, `<public key>.ed25519`, both in hexadecimal. It signs
`delta.json`, which holds the digests of all else but the card. Whoever can write to a place can
leave a signature out, so that what counts is whose signature is asked for, not that there is one.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from deltatune.core.artefact import FILES
from deltatune.core.errors import ArtefactError, ConfigurationError, StateError, UnsupportedError
from deltatune.core.untrusted import content_of

__all__ = ["check_signed", "is_signature", "make_key", "sign", "signers"]

_NAME = re.compile(r"([0-9a-f]{64})\.ed25519")
_KEY = re.compile(r"[0-9a-f]{64}")
_SIGNATURE = re.compile(rb"[0-9a-f]{128}\n")
_LONGEST = 256  # bytes of a signature
# No signature made for another purpose is one of a delta.
_PURPOSE = b"deltatune delta 1\n"


def is_signature(path: Path) -> bool:
    """Whether a file has the name of a signature."""
    return _NAME.fullmatch(path.name) is not None


def make_key(path: str | Path) -> str:
    """Writes a new private key, PKCS 8 in PEM, which its owner alone can read.

    Returns:
        The public key, 64 hexadecimal digits: what others trust.

    Raises StateError if there is a file already, or it cannot be written.
    """
    key = _library("asymmetric.ed25519").Ed25519PrivateKey.generate()
    forms = _library("serialization")
    content = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise StateError(f"The key cannot be written to {path}: {error.strerror}.") from None
    with open(descriptor, "wb") as file:
        file.write(content)
    return _public(key)


def sign(folder: str | Path, key: str | Path) -> str:
    """Signs the delta in `folder` with the private key in a file; returns the public one.

    Raises:
        ConfigurationError: the file holds no Ed25519 key without a password.
        ArtefactError: there is no delta, or the signature cannot be written.
    """
    private = _private(Path(key))
    name, signature = _public(private), private.sign(_signed(Path(folder)))
    try:
        (Path(folder) / f"{name}.ed25519").write_bytes(signature.hex().encode() + b"\n")
    except OSError as error:
        raise ArtefactError(f"The signature cannot be written to {folder}: {error}.") from None
    return name


def signers(folder: str | Path) -> tuple[str, ...]:
    """The public keys whose signatures of the delta in `folder` are right, sorted.

    Raises ArtefactError if there is no delta, or a signature is wrong.
    """
    found = sorted(path for path in Path(folder).iterdir() if is_signature(path))
    for path in found:
        _verify(path)
    return tuple(path.stem for path in found)


def check_signed(folder: str | Path, trusted: Collection[str]) -> str:
    """The first of the trusted keys that has signed the delta in `folder`.

    Raises:
        ArtefactError: none of them has, or the signature of one is wrong.
        ConfigurationError: what is trusted is no public key.
    """
    for key in trusted:
        if _KEY.fullmatch(key) is None:
            raise ConfigurationError(
                f"A public key has 64 hexadecimal digits, as `make_key` gives it; found {key!r}."
            )
        path = Path(folder) / f"{key}.ed25519"
        if path.is_file():
            _verify(path)
            return key
    raise ArtefactError(
        f"The delta in {folder} is signed by none of the keys that are trusted "
        f"({', '.join(trusted)}). Ask its maker to sign it, or do not use it."
    )


def _verify(path: Path) -> None:
    """Raises ArtefactError if a signature is none of the delta beside it."""
    public = _library("asymmetric.ed25519").Ed25519PublicKey
    try:
        content = content_of(path, _LONGEST)
        if _SIGNATURE.fullmatch(content) is None:
            raise ValueError("it has another form")
        key = public.from_public_bytes(bytes.fromhex(path.stem))
        key.verify(bytes.fromhex(content.decode()), _signed(path.parent))
    except (OSError, ValueError, _library("", "exceptions").InvalidSignature) as error:
        raise ArtefactError(
            f"{path} does not sign the delta beside it ({str(error) or 'it is of another text'}). "
            "Fetch it again, or do not use it."
        ) from None


def _signed(folder: Path) -> bytes:
    """What is signed."""
    try:
        return _PURPOSE + content_of(folder / FILES[0])
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{folder} is no delta: {error}.") from None


def _private(path: Path) -> Any:
    try:
        key = _library("serialization").load_pem_private_key(path.read_bytes(), None)
    except (OSError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{path} holds no private key without a password ({error}). `deltatune hub key` makes "
            "one."
        ) from None
    if not isinstance(key, _library("asymmetric.ed25519").Ed25519PrivateKey):
        raise ConfigurationError(f"{path} holds a key of another kind than Ed25519.")
    return key


def _public(private: Any) -> str:
    found: bytes = private.public_key().public_bytes_raw()
    return found.hex()


def _library(name: str, part: str = "hazmat.primitives") -> Any:
    try:
        return importlib.import_module(".".join(filter(None, ("cryptography", part, name))))
    except ImportError as error:
        raise UnsupportedError(
            "Signatures need cryptography. Install it with: pip install 'deltatune[signatures]'"
        ) from error
