"""The options of TLS and keys. A secret has `hide_input`: it is not shown again."""

from pathlib import Path
from typing import Annotated

import typer

from moe_core.service.tls_files import TlsFiles

# Set by serve for the gateway that it starts, so that it can watch it: a digest, not a key.
LAUNCHER_KEY_HASH = "EPSERVE_LAUNCHER_KEY_HASH"

SECURITY = "Security"

TlsCertOption = Annotated[
    Path | None,
    typer.Option(
        help="PEM certificate that names this process's role; see epserve certs.",
        rich_help_panel=SECURITY,
    ),
]
TlsKeyOption = Annotated[
    Path | None, typer.Option(help="PEM private key of --tls-cert.", rich_help_panel=SECURITY)
]
TlsCaOption = Annotated[
    Path | None,
    typer.Option(
        help="PEM certificate of the CA that signs whom to believe.", rich_help_panel=SECURITY
    ),
]
InsecureOption = Annotated[
    bool,
    typer.Option(
        "--insecure",
        help="Listen beyond this machine without TLS, open to anybody.",
        rich_help_panel=SECURITY,
    ),
]
ApiKeysOption = Annotated[
    Path | None,
    typer.Option(
        help="File of API keys (epserve keys new); without it clients need none.",
        rich_help_panel=SECURITY,
    ),
]
LauncherKeyHashOption = Annotated[str | None, typer.Option(envvar=LAUNCHER_KEY_HASH, hidden=True)]
ApiKeyOption = Annotated[
    str | None,
    typer.Option(
        envvar="EPSERVE_API_KEY",
        hide_input=True,
        help="Key to show; better given in the environment.",
        rich_help_panel=SECURITY,
    ),
]


def absolute(files: TlsFiles | None) -> TlsFiles | None:
    """For processes that may run elsewhere."""
    if files is None or files.cert is None or files.key is None:
        return files
    return TlsFiles(files.ca.absolute(), files.cert.absolute(), files.key.absolute())
