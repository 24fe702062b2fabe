"""The commands that make what a secured cluster needs: `epserve certs` and `epserve keys`.

Knows their options and what they print. Knows neither X.509 nor a key file's form.
"""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from epserve.options import common
from epserve.settings_command import SettingsCommand

DEFAULT_DAYS = 365
DEFAULT_HOSTS = ("localhost", "127.0.0.1", "::1")

keys = typer.Typer(name="keys", help="API keys of the gateway's clients.", no_args_is_help=True)


def certs(
    directory: Annotated[Path, typer.Argument(help="Where to put them; a CA there is used again.")],
    days: Annotated[
        int, typer.Option(min=1, max=3650, help="How long the certificates are good.")
    ] = DEFAULT_DAYS,
    hosts: Annotated[
        list[str] | None,
        typer.Option(
            help="Name or address by which clients reach the gateway; repeatable. "
            f"{', '.join(DEFAULT_HOSTS)} are always named."
        ),
    ] = None,
    debug: common.DebugOption = False,
) -> None:
    """Make a CA and a certificate for each role of a cluster."""
    from epserve.certs import LEAVES, make_certificates

    named = dict.fromkeys((*DEFAULT_HOSTS, *_split(hosts or [])))
    for path in make_certificates(directory, days, tuple(named)):
        typer.echo(f"wrote {path}")
    where = shlex.quote(str(directory))
    typer.echo(f"roles: {', '.join(LEAVES)}; serve is gateway, attn and expert in one")
    typer.echo(f"keep {where}/ca.key away from the machines that serve")
    typer.echo(
        f"next: epserve serve --model DIR --tls-cert {where}/serve.crt "
        f"--tls-key {where}/serve.key --tls-ca {where}/ca.crt"
    )


def _split(values: list[str]) -> list[str]:
    """Each value may hold several, with commas between them."""
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


@keys.callback()
def _keys(debug: common.DebugOption = False) -> None:
    """API keys of the gateway's clients."""


@keys.command(cls=SettingsCommand)
def new(
    name: Annotated[str, typer.Argument(help="Whose key it is; shown in logs.")],
    file: Annotated[
        Path | None, typer.Option(help="Add the entry to this key file, which may be new.")
    ] = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="It may also scale, rebalance and drain the cluster.")
    ] = False,
    debug: common.DebugOption = False,
) -> None:
    """Make a key; it is printed once and kept nowhere."""
    from epserve.key_file import append_entry, check_entry, entry_text
    from gateway.api_keys import new_key

    key = new_key()
    check_entry(name, key)
    if file is not None:
        append_entry(file, name, key, admin=admin)
    typer.echo(key)
    if file is not None:
        typer.echo(f"added {name} to {file}; a running gateway knows it within a second", err=True)
    else:
        typer.echo("to let it in, add this to the file of --api-keys:", err=True)
        typer.echo(entry_text(name, key, admin=admin), nl=False, err=True)
