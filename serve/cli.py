"""The command line: `onebase serve MODEL`, `onebase demo`, `onebase check ADAPTER --model MODEL`."""

from __future__ import annotations

import json
import shlex
import signal
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
import uvicorn
from pydantic import ValidationError

from onebase.bench.cli import app as bench
from onebase.serve.adapter_commands.commands import app as adapters
from onebase.serve.config import Settings, load_settings

SHUTDOWN_SECONDS = 30

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

app.add_typer(bench, name="bench")
app.add_typer(adapters, name="adapters")

Port = Annotated[int | None, typer.Option(help="Port to listen on.  [default: 8000]")]
Host = Annotated[str | None, typer.Option(help="Address to listen on.  [default: 127.0.0.1]")]
DataDir = Annotated[Path | None, typer.Option(help="Where the registry keeps adapters.")]
Key = Annotated[str | None, typer.Option(help="Bearer key. Prefer the environment variable or the TOML file.")]


def _one_of(*allowed: str) -> Callable[[str], str]:
    """A callback that refuses every other value."""

    def check(value: str) -> str:
        if value not in allowed:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(allowed)}")
        return value

    return check


@app.callback()
def main() -> None:
    """One frozen base model, every adapter, one forward pass."""


@app.command()
def serve(
    model: Annotated[str | None, typer.Argument(help="Folder or Hugging Face id of the base model.")] = None,
    config: Annotated[Path | None, typer.Option(envvar="ONEBASE_CONFIG", help="TOML file with these options.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="What requests call the base model.")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER; may be repeated.")] = None,
    host: Host = None,
    port: Port = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model's repository.")] = None,
    trust_remote_code: Annotated[bool | None, typer.Option(help="Run code that comes with the model.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Context: prompt and answer, in tokens.")] = None,
    max_batch_tokens: Annotated[int | None, typer.Option(help="Tokens of one forward pass.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences that run at once.")] = None,
    max_inflight_seqs: Annotated[
        int | None, typer.Option(help="Sequences accepted at once, running or waiting; over it 429.")
    ] = None,
    max_inflight_tokens: Annotated[int | None, typer.Option(help="Their prompt tokens; over it 429.")] = None,
    max_step_stretch: Annotated[
        float | None, typer.Option(help="How many times as long a prompt may make a step for who decodes; 0: no bound.")
    ] = None,
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic", help="Same request, same bits, whatever else runs. Slower.")
    ] = None,
    overlap: Annotated[
        bool | None, typer.Option(help="Deliver a step while the next one is computed. Default: on GPUs.")
    ] = None,
    speculate: Annotated[
        str | None, typer.Option(help="off, or ngram: guess that text repeats, and verify the guesses in one step.")
    ] = None,
    speculative_tokens: Annotated[int | None, typer.Option(help="Guesses of a sequence in a step.")] = None,
    ngram_min: Annotated[int | None, typer.Option(help="Tokens that must have come before, at least.")] = None,
    ngram_max: Annotated[int | None, typer.Option(help="The same, at most; longer matches go first.")] = None,
    prefix_caching: Annotated[
        bool | None, typer.Option(help="Keep pages of earlier requests for those that begin alike.")
    ] = None,
    cuda_graphs: Annotated[bool | None, typer.Option(help="On CUDA, capture decode steps and replay them.")] = None,
    kv_dtype: Annotated[
        str | None, typer.Option(help="auto: K and V as the model has them; fp8_e4m3: in half the memory.")
    ] = None,
    device_memory: Annotated[float | None, typer.Option(help="Share of the device to use, 0 to 1.")] = None,
    kv_memory: Annotated[str | None, typer.Option(help="GiB for KV pages, or MIN:MAX.")] = None,
    adapter_memory: Annotated[str | None, typer.Option(help="GiB for adapters on the device, or MIN:MAX.")] = None,
    host_cache: Annotated[float | None, typer.Option(help="GiB for adapters in host memory; 0 for none.")] = None,
    compiled_cache: Annotated[
        float | None, typer.Option(help="GiB for compiled adapters on disk; those that were not read longest go first.")
    ] = None,
    data_dir: DataDir = None,
    allow_path: Annotated[
        list[Path] | None, typer.Option(help="Adapters may be loaded from below this folder.")
    ] = None,
    allow_hub: Annotated[
        list[str] | None, typer.Option(help="ORG, ORG/NAME or * of the Hugging Face Hub: adapters may come from there.")
    ] = None,
    allow_bucket: Annotated[
        list[str] | None, typer.Option(help="s3://BUCKET/PREFIX, gs:// or az://: adapters may come from below it.")
    ] = None,
    allow_url: Annotated[
        list[str] | None, typer.Option(help="https://HOST/PREFIX: adapters may come from below it.")
    ] = None,
    resolver: Annotated[
        str | None, typer.Option(help="Source of models that are not there, with {name} in it: hf://org/{name}.")
    ] = None,
    watch: Annotated[
        Path | None, typer.Option(help="Folder whose folders become adapters, as they come and go.")
    ] = None,
    max_upload_gib: Annotated[float | None, typer.Option(help="Largest adapter, in GiB.")] = None,
    api_key: Key = None,
    admin_key: Key = None,
    keys: Annotated[Path | None, typer.Option(help="TOML file of tenants: names, keys, weights, limits.")] = None,
    insecure: Annotated[bool | None, typer.Option(help="Serve other machines without keys.")] = None,
) -> None:
    """Serve a base model and its adapters over HTTP.

    Each option has an environment variable, ONEBASE_..., and a line in the --config file: the command line wins over
    the environment, and the environment over the file.
    """
    given = dict(locals())
    _run(_settings({key: value for key, value in given.items() if key != "config" and value not in (None, [])}, config))


@app.command()
def demo(host: Host = None, port: Port = None, data_dir: DataDir = None) -> None:
    """Serve the small model and the adapters that come with OneBase, to try it out."""
    from onebase.serve.demo import ADAPTERS, BASE, examples

    with ExitStack() as cleanup:
        folder = data_dir or Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="onebase-demo-")))
        given: dict[str, Any] = {
            "model": str(BASE),
            "served_model_name": "onebase-demo",
            "adapter": [f"{name}={path}" for name, path in ADAPTERS.items()],
            "data_dir": folder,
        }
        given |= {key: value for key, value in (("host", host), ("port", port)) if value is not None}
        _run(_settings(given, None), examples)


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    model: Annotated[str, typer.Option(help="Folder or Hugging Face id of the base model.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model's repository.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
    dtype: Annotated[str, typer.Option(callback=_one_of("auto", "float32", "bfloat16", "float16"))] = "auto",
    device: Annotated[str, typer.Option(callback=_one_of("auto", "cpu", "cuda"))] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Compile an adapter against a base, without serving it: what it does and costs, or why it would be refused."""
    from onebase.adapters.errors import OneBaseError
    from onebase.serve.check_adapter import check_adapter
    from onebase.serve.engine.config import EngineConfig
    from onebase.serve.model.loader import load_model

    config = EngineConfig(
        model=model, revision=revision, trust_remote_code=trust_remote_code, dtype=dtype, device=device
    )
    try:
        report = check_adapter(path, load_model(config))
    except OneBaseError as error:
        typer.echo(f"onebase: {error.message}", err=True)
        raise typer.Exit(1) from None
    typer.echo(json.dumps(report.to_dict()) if as_json else report.text())


def _settings(given: dict[str, Any], config: Path | None) -> Settings:
    try:
        return load_settings(given, config)
    except ValidationError as error:
        raise typer.BadParameter("\n".join(_problem(item["loc"], item["msg"]) for item in error.errors())) from error
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise typer.BadParameter(f"--config: {error}") from error


def _problem(location: tuple[int | str, ...], message: str) -> str:
    where = ".".join(str(part) for part in location)
    return f"{where}: {message}" if where else message.removeprefix("Value error, ")


def _run(settings: Settings, tries: Mapping[str, str] | None = None) -> None:
    """Serves until a signal; exit code 1 where the server could not start.

    tries: model -> question, shown when ready.
    """
    from onebase.serve.api.app import create_app
    from onebase.serve.engine.supervisor import SupervisedEngine
    from onebase.serve.logs import configure_logs

    configure_logs()
    application = create_app(settings, SupervisedEngine(settings.engine_config()))
    state = application.state.server
    http = uvicorn.Server(
        uvicorn.Config(
            application,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
    )
    state.on_ready.append(lambda: typer.echo(_welcome(settings, http, tries or {})))
    state.on_failure.append(lambda: setattr(http, "should_exit", True))
    signal.signal(signal.SIGTERM, _terminated)
    try:
        http.run()
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if state.failure is not None:
        typer.echo(f"onebase: {state.failure}", err=True)
    if state.failure is not None or not http.started:
        raise typer.Exit(1)


def _terminated(number: int, frame: FrameType | None) -> None:
    """uvicorn shuts down on SIGTERM and then raises it again: end as planned, so that temporary folders go."""
    raise SystemExit(0)


def _welcome(settings: Settings, http: uvicorn.Server, tries: Mapping[str, str]) -> str:
    """Where the server listens, and what to try: questions for the chat, or else a completion."""
    host, port = http.servers[0].sockets[0].getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    key = " -H 'Authorization: Bearer KEY'" if settings.api_key else ""
    post = f"  curl {address}/v1/%s{key} -H 'Content-Type: application/json' -d %s"
    lines = [f"OneBase serves {settings.base_name} at {address}", "", f"  curl {address}/v1/models{key}"]
    for model, question in tries.items():
        messages = [{"role": "user", "content": question}]
        lines.append(post % ("chat/completions", shlex.quote(json.dumps({"model": model, "messages": messages}))))
    if not tries:
        model = next(iter(settings.adapters), settings.base_name)
        lines.append(
            post % ("completions", shlex.quote(json.dumps({"model": model, "prompt": "Hello", "max_tokens": 32})))
        )
    return "\n".join([*lines, ""])
