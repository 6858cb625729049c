"""Signatures over release statements: ed25519 in a DSSE envelope, the form that in-toto tools read.

DSSE signs `PAE(type, body) = "DSSEv1" SP len(type) SP type SP len(body) SP body`, so neither the type nor
the body can be reinterpreted (secure-systems-lab/dsse, protocol.md).
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from temper.core.errors import DataError, IntegrityError
from temper.core.hashing import canonical_json
from temper.core.storage import disk_errors

PAYLOAD_TYPE = "application/vnd.in-toto+json"


def new_key(path: Path) -> Ed25519PrivateKey:
    """Make an ed25519 key; the private half goes to `path` (mode 600), the public half to `path`.pub."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600, exist_ok=False)
        path.write_bytes(private)
        path.with_name(path.name + ".pub").write_bytes(public_pem(key.public_key()))
    return key


def public_pem(key: Ed25519PublicKey) -> bytes:
    """A public key in PEM."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def load_private(path: Path) -> Ed25519PrivateKey:
    """The private key in a PEM file. Raises DataError where there is none of that kind."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} holds no readable private key", why=str(error), do="give an unencrypted ed25519 key in PEM") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise DataError(
            f"{path} holds a {type(key).__name__}", why="releases are signed with ed25519", do="make a key with temper.registry.new_key"
        )
    return key


def load_public(path: Path) -> Ed25519PublicKey:
    """The public key in a PEM file. Raises DataError where there is none of that kind."""
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} holds no readable public key", why=str(error), do="give an ed25519 public key in PEM") from error
    if not isinstance(key, Ed25519PublicKey):
        raise DataError(f"{path} holds a {type(key).__name__}", why="releases are signed with ed25519")
    return key


def key_id(key: Ed25519PublicKey) -> str:
    """The SHA-256 of a public key's raw bytes."""
    return hashlib.sha256(key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)).hexdigest()


def pre_authentication(body: bytes) -> bytes:
    """DSSE's PAE of an in-toto payload: the bytes that are signed."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(body), body)


def sign(statement: dict[str, Any], key: Ed25519PrivateKey) -> dict[str, Any]:
    """`statement` in a DSSE envelope with one ed25519 signature."""
    body = canonical_json(statement).encode()
    signature = key.sign(pre_authentication(body))
    return {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(body).decode(),
        "signatures": [{"keyid": key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}],
    }


def verify(envelope: dict[str, Any], key: Ed25519PublicKey) -> dict[str, Any]:
    """The statement inside `envelope`. Raises IntegrityError unless `key` signed exactly these bytes."""
    wanted = key_id(key)
    try:
        body = base64.b64decode(envelope["payload"], validate=True)
        signatures = [base64.b64decode(item["sig"], validate=True) for item in envelope["signatures"] if item["keyid"] == wanted]
        kind = envelope["payloadType"]
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError("the signature envelope is malformed", why=repr(error), do="sign the release again") from error
    if kind != PAYLOAD_TYPE or not signatures:
        raise IntegrityError(
            "the release is not signed by this key",
            why=f"key {wanted[:16]} is not among its signatures, or the payload is {kind!r}",
            do="sign it, or trust the key that did",
        )
    for signature in signatures:
        try:
            key.verify(signature, pre_authentication(body))
        except InvalidSignature as error:
            raise IntegrityError(
                "the release's signature does not fit its statement",
                why=f"key {wanted[:16]} did not sign these bytes",
                do="do not use this release; register and sign it again",
            ) from error
    statement: dict[str, Any] = json.loads(body)
    return statement
