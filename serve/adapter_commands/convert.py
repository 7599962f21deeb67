"""``onebase adapters convert``: pickled folders to safetensors, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onebase.adapters.errors import AdapterError


def convert(
    source: Annotated[Path, typer.Argument(help="Folder with adapter_config.json and pickled weights (.bin).")],
    target: Annotated[Path, typer.Argument(help="New folder for adapter_config.json and safetensors.")],
) -> None:
    """Turn pickled weights into safetensors, without running what a pickle may hold.

    Reads PEFT's and LLM-Adapters' adapter_model.bin and AdapterHub's pytorch_adapter.bin in a process of its own.
    """
    from onebase.adapters.convert import convert as run

    try:
        done = run(source, target)
    except AdapterError as error:
        typer.echo(f"onebase: {error.message}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{target}: {done.family}, {done.num_tensors} tensors, {done.nbytes} bytes")
