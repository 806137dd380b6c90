"""Sign a package: a detached Ed25519 signature over its manifest, which holds the digest of every file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mctune.core.errors import UsageError


@dataclass(frozen=True)
class Signer:
    """A private key that was read; ``sign`` makes 64 bytes of a message."""

    sign: Callable[[bytes], bytes]

    @classmethod
    def of(cls, key: Path) -> Signer:
        """From a file with an Ed25519 private key in PEM, without a password.

        Raises:
            UsageError: if it is no such file, or ``cryptography`` is not installed.
        """
        try:
            from cryptography.exceptions import UnsupportedAlgorithm
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
            from cryptography.hazmat.primitives.serialization import load_pem_private_key
        except ImportError as error:
            raise UsageError("--sign needs the package cryptography: pip install 'mctune[sign]'") from error
        try:
            private = load_pem_private_key(key.read_bytes(), None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise UsageError(f"--sign {key} is not a private key in PEM without a password: {error}") from error
        if not isinstance(private, Ed25519PrivateKey):
            raise UsageError(f"--sign {key} is not an Ed25519 key: `openssl genpkey -algorithm ed25519` makes one")
        return cls(private.sign)
