"""TLS of the HTTP port, with the certificate that its files hold at each handshake.

Knows Python's ssl; which files make a good set is certificates.py's. Clients are not asked for a
certificate: they show an API key.
"""

import ssl

from moe_core.service.certificates import Certificates, PemSet


class HttpsContext:
    """`context` is what connections begin with; each goes on with the newest good one."""

    def __init__(self, certificates: Certificates) -> None:
        self._certificates = certificates
        self._given = certificates.current()
        self._newest = self._load()
        self.context = self._load()
        self.context.sni_callback = self._on_hello

    def _on_hello(
        self, connection: ssl.SSLObject, server_name: str | None, context: ssl.SSLContext
    ) -> None:
        pem: PemSet = self._certificates.current()
        if pem is not self._given:
            self._newest = self._load()
            self._given = pem
        connection.context = self._newest

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(*self._certificates.own_files)
        return context
