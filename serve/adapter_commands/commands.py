"""``onebase adapters ls|show|versions|push|rm|pin|unpin|label|alias|rollback|load|unload|gc|convert``.

All but convert talk to a running server. They exit with status 1 and the server's message where it refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from onebase.adapters.errors import AdapterError
from onebase.serve.adapter_commands.client import AdapterClient, CallFailed
from onebase.serve.adapter_commands.convert import convert
from onebase.serve.adapter_commands.output import CARD_COLUMNS, VERSION_COLUMNS, complain, show_one, show_rows

DEFAULT_URL = "http://127.0.0.1:8000"
CURRENT = "current"  # an alias of whichever version is

app = typer.Typer(no_args_is_help=True, help="Adapters of a running server; `convert` works without one.")
app.command()(convert)

Url = Annotated[str, typer.Option(envvar="ONEBASE_URL", help="Address of the server.")]
Key = Annotated[
    str | None,
    typer.Option(
        envvar="ONEBASE_ADMIN_KEY", help="Admin key, or API key where there is no other; prefer the environment."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs.")]
Name = Annotated[str, typer.Argument(help="Name of the adapter.")]
Reference = Annotated[str, typer.Argument(help="name, name@3, name@sha256:..., or an alias.")]
Force = Annotated[bool, typer.Option("--force", help="Abort the requests that use it.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the end, or return at once.")]


@app.command()
def ls(
    prefix: Annotated[str | None, typer.Option(help="Names that begin so.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="key=value; may be repeated, all must hold.")] = None,
    pinned: Annotated[bool | None, typer.Option(help="Only pinned ones, or only the others.")] = None,
    state: Annotated[str | None, typer.Option(help="ready, fetching, checking or failed.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many.  [default: all]")] = None,
    url: Url = DEFAULT_URL,
    admin_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """List adapters, by name."""
    given = {"prefix": prefix, "label": [_label(item) for item in label or []], "pinned": _flag(pinned), "state": state}
    filters = {key: value for key, value in given.items() if value not in (None, [])}
    with _connected(url, admin_key) as server:
        show_rows(server.cards(filters, limit), CARD_COLUMNS, as_json=as_json)


@app.command()
def show(reference: Reference, url: Url = DEFAULT_URL, admin_key: Key = None, as_json: AsJson = False) -> None:
    """Show one adapter, or one version of it."""
    with _connected(url, admin_key) as server:
        show_one(server.card(reference), as_json=as_json)


@app.command()
def versions(name: Name, url: Url = DEFAULT_URL, admin_key: Key = None, as_json: AsJson = False) -> None:
    """List the versions of a name, oldest first."""
    with _connected(url, admin_key) as server:
        show_rows(server.versions(name), VERSION_COLUMNS, as_json=as_json)


@app.command()
def push(
    name: Name,
    source: Annotated[str, typer.Argument(help="Folder to upload, or a source that the server fetches: hf://...")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit, where the source has them.")] = None,
    wait: Wait = True,
    url: Url = DEFAULT_URL,
    admin_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Upload a folder, or have the server fetch a source. A name that exists gets a new version."""
    from onebase.serve.adapter_commands.push import push as send

    with _connected(url, admin_key) as server:
        show_one(send(server, name, source, revision, wait=wait, quiet=as_json), as_json=as_json)


@app.command()
def rm(
    name: Name,
    force: Force = False,
    url: Url = DEFAULT_URL,
    admin_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Remove a name with all its versions; gc takes old ones. Its requests finish, unless --force ends them."""
    with _connected(url, admin_key) as server:
        show_one(server.delete(name, force=force), as_json=as_json)


@app.command()
def pin(name: Name, url: Url = DEFAULT_URL, admin_key: Key = None, as_json: AsJson = False) -> None:
    """Keep the current version of a name on the device."""
    with _connected(url, admin_key) as server:
        show_one(server.change(name, pinned=True), as_json=as_json)


@app.command()
def unpin(name: Name, url: Url = DEFAULT_URL, admin_key: Key = None, as_json: AsJson = False) -> None:
    """Let a name leave the device again when others need the room."""
    with _connected(url, admin_key) as server:
        show_one(server.change(name, pinned=False), as_json=as_json)


@app.command()
def label(
    name: Name,
    changes: Annotated[list[str], typer.Argument(help="key=value sets a label, key- removes it.")],
    url: Url = DEFAULT_URL,
    admin_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Set and remove labels of a name."""
    with _connected(url, admin_key) as server:
        show_one(server.change(name, labels=dict(map(_change, changes))), as_json=as_json)


@app.command()
def alias(
    name: Name,
    changes: Annotated[
        list[str], typer.Argument(help="alias=3 or alias=current points it to a version, alias- removes it.")
    ],
    url: Url = DEFAULT_URL,
    admin_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Set and remove other names for versions of a name."""
    with _connected(url, admin_key) as server:
        aliases = {key: None if value is None else _version(value) for key, value in map(_change, changes)}
        show_one(server.change(name, aliases=aliases), as_json=as_json)


@app.command()
def rollback(
    name: Name,
    version: Annotated[
        int | None, typer.Argument(min=1, help="Version to make current.  [default: the one before]")
    ] = None,
    url: Url = DEFAULT_URL,
    admin_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Make an earlier version of a name current again."""
    with _connected(url, admin_key) as server:
        show_one(server.rollback(name, version), as_json=as_json)


@app.command()
def load(reference: Reference, url: Url = DEFAULT_URL, admin_key: Key = None, as_json: AsJson = False) -> None:
    """Bring an adapter to the device before the first request."""
    with _connected(url, admin_key) as server:
        show_one(server.load(reference), as_json=as_json)


@app.command()
def unload(
    reference: Reference,
    force: Force = False,
    wait: Wait = True,
    url: Url = DEFAULT_URL,
    admin_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Take an adapter off the device, once the requests that use it have ended."""
    with _connected(url, admin_key) as server:
        show_one(server.unload(reference, force=force, wait=wait), as_json=as_json)


@app.command()
def gc(
    keep: Annotated[
        int | None, typer.Option(min=0, help="Remove old versions beyond the newest so many, the current one counted.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go.")] = False,
    url: Url = DEFAULT_URL,
    admin_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Remove old versions and files that nothing needs."""
    with _connected(url, admin_key) as server:
        show_one(server.collect(keep, dry_run=dry_run), as_json=as_json)


@contextmanager
def _connected(url: str, key: str | None) -> Iterator[AdapterClient]:
    """A client whose refusals end the command with status 1."""
    try:
        with AdapterClient(url, key) as client:
            yield client
    except (CallFailed, AdapterError) as error:
        complain(str(error))
        raise typer.Exit(1) from None


def _change(text: str) -> tuple[str, str | None]:
    """``key=value`` -> (key, value); ``key-`` -> (key, None)."""
    key, is_set, value = text.partition("=")
    if is_set:
        return key, value
    if not text.endswith("-"):
        raise typer.BadParameter(f"{text!r} is neither key=value nor key-")
    return text[:-1], None


def _label(text: str) -> str:
    """The command line's key=value as the route's key:value."""
    key, is_set, value = text.partition("=")
    if not is_set:
        raise typer.BadParameter(f"--label: {text!r} is not key=value")
    return f"{key}:{value}"


def _version(text: str) -> int | str:
    if text == CURRENT:
        return text
    if not text.isdecimal():
        raise typer.BadParameter(f"{text!r} is neither the number of a version nor {CURRENT!r}")
    return int(text)


def _flag(value: bool | None) -> Any:
    return None if value is None else str(value).lower()
