"""Which files a process or a client uses for TLS.

Knows paths and that they come together. Reads none of them: certificates.py does.
"""

from dataclasses import dataclass
from pathlib import Path

from moe_core.errors import ConfigError

MAKE_THEM = "epserve certs DIR makes all three"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """`ca` signs whom to believe. `cert` and `key` are one's own: a process has them, a client
    may, and neither comes without the other."""

    ca: Path
    cert: Path | None = None
    key: Path | None = None

    @classmethod
    def of_process(cls, cert: Path | None, key: Path | None, ca: Path | None) -> "TlsFiles | None":
        """None where TLS is off. Raises ConfigError unless all three are given, or none."""
        given = {"tls_cert": cert, "tls_key": key, "tls_ca": ca}
        missing = [name for name, path in given.items() if path is None]
        if len(missing) == len(given):
            return None
        if missing or ca is None:
            rule = f"a process needs --tls-cert, --tls-key and --tls-ca, or none; {MAKE_THEM}"
            raise ConfigError(missing[0], None, rule)
        return cls(ca, cert, key)

    @classmethod
    def of_client(cls, ca: Path | None, cert: Path | None, key: Path | None) -> "TlsFiles | None":
        """None where TLS is off. Raises ConfigError for a certificate without its key or CA."""
        if (cert is None) != (key is None):
            missing = "tls_cert" if cert is None else "tls_key"
            raise ConfigError(missing, None, "--tls-cert and --tls-key come together")
        if ca is None:
            if cert is not None:
                raise ConfigError("tls_ca", None, "--tls-cert needs --tls-ca, to know the server")
            return None
        return cls(ca, cert, key)

    def arguments(self) -> list[str]:
        """The command line of a process that uses the same files."""
        flags = ("--tls-ca", self.ca), ("--tls-cert", self.cert), ("--tls-key", self.key)
        return [word for flag, path in flags if path for word in (flag, str(path))]
