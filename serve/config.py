"""Every option of the server in one object: command line > ONEBASE_... environment > TOML file > default."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PlainValidator, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from onebase.adapters.errors import AdapterNameInvalid
from onebase.adapters.names import check_name
from onebase.serve.engine.config import GIB, EngineConfig
from onebase.serve.tenants import read_keys

if TYPE_CHECKING:
    from onebase.adapters.sources import SourceOptions

MAX_GIB = 1 << 20
COMPILED = "compiled"  # below the data folder: the registry removes what is there with its blob


@dataclass(frozen=True, slots=True)
class MemoryRange:
    """A budget in GiB. most: None where it is a fixed size."""

    least: float
    most: float | None = None

    @classmethod
    def parse(cls, value: object) -> MemoryRange:
        """A number, or ``MIN:MAX``. Raises ValueError."""
        if isinstance(value, cls):
            return value
        numbers = [_gib(part) for part in str(value).split(":")]
        if len(numbers) > 2 or numbers[0] > numbers[-1]:
            raise ValueError(f"{value!r} is neither a number of GiB nor MIN:MAX")
        return cls(*numbers)


def _gib(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= MAX_GIB:
        raise ValueError(f"{text!r} is not a number of GiB above 0 and up to {MAX_GIB}")
    return number


Memory = Annotated[MemoryRange, PlainValidator(MemoryRange.parse)]


def default_data_dir() -> Path:
    root = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(root).expanduser() / "onebase"


class Settings(BaseSettings):
    """What `onebase serve` was told. Lists come from the environment as comma-separated text."""

    model_config = SettingsConfigDict(env_prefix="ONEBASE_", extra="forbid", frozen=True, hide_input_in_errors=True)

    model: str = Field(min_length=1, description="folder or Hugging Face id of the base model")
    revision: str | None = None
    trust_remote_code: bool = False
    served_model_name: str = Field(default="", max_length=256, description="name of the base in requests")
    adapter: Annotated[tuple[str, ...], NoDecode] = ()
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_model_len: int | None = Field(default=None, ge=1, le=1 << 24)
    max_batch_tokens: int = Field(default=2048, ge=1, le=1 << 20)
    max_num_seqs: int = Field(default=64, ge=1, le=1 << 16)
    max_inflight_seqs: int = Field(default=4096, ge=1, le=1 << 20)
    max_inflight_tokens: int = Field(default=1 << 23, ge=1, le=1 << 32)
    max_step_stretch: float = Field(default=2.2, ge=0, le=1000)
    prefix_caching: bool = True
    deterministic: bool = False
    overlap: bool | None = None
    cuda_graphs: bool = True
    speculate: Literal["off", "ngram"] = "off"
    speculative_tokens: int = Field(default=4, ge=1, le=64)
    ngram_min: int = Field(default=2, ge=1, le=64)
    ngram_max: int = Field(default=4, ge=1, le=64)
    kv_dtype: Literal["auto", "fp8_e4m3"] = "auto"
    device_memory: float = Field(default=0.9, gt=0, le=1)
    kv_memory: Memory | None = None
    adapter_memory: Memory | None = None
    host_cache: float | None = Field(default=None, ge=0, le=MAX_GIB)
    compiled_cache: float | None = Field(default=None, gt=0, le=MAX_GIB)
    data_dir: Path = Field(default_factory=default_data_dir)
    allow_path: Annotated[tuple[Path, ...], NoDecode] = ()
    allow_hub: Annotated[tuple[str, ...], NoDecode] = ()
    allow_bucket: Annotated[tuple[str, ...], NoDecode] = ()
    allow_url: Annotated[tuple[str, ...], NoDecode] = ()
    resolver: str | None = None
    watch: Path | None = None
    max_upload_gib: float = Field(default=4.0, gt=0, le=MAX_GIB)
    api_key: SecretStr | None = None
    admin_key: SecretStr | None = None
    keys: Path | None = None
    insecure: bool = False

    @field_validator("model")
    @classmethod
    def _there(cls, value: str) -> str:
        if value.startswith(("/", "./", "../")) and not Path(value).is_dir():
            raise ValueError(f"{value} is not a folder")
        return value

    @field_validator("adapter", "allow_path", "allow_hub", "allow_bucket", "allow_url", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("adapter")
    @classmethod
    def _named(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = [_split_adapter(item)[0] for item in value]
        if len(set(names)) != len(names):
            raise ValueError("--adapter: the same name is given twice")
        return value

    @field_validator("allow_path")
    @classmethod
    def _folders(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(_folder(path, "--allow-path") for path in value)

    @field_validator("watch")
    @classmethod
    def _watched(cls, value: Path | None) -> Path | None:
        return None if value is None else _folder(value, "--watch")

    @field_validator("max_step_stretch")
    @classmethod
    def _stretches(cls, value: float) -> float:
        if 0 < value <= 1:
            raise ValueError(f"{value:g} leaves no time for prompts; allowed is more than 1, or 0 for no bound")
        return value

    @field_validator("api_key", "admin_key")
    @classmethod
    def _key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value():
            raise ValueError("a key must not be empty")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        has_keys = self.api_key is not None or self.keys is not None
        if not self.insecure and not is_loopback(self.host) and (not has_keys or self.admin_key is None):
            raise ValueError(
                f"host {self.host} is reachable from other machines: set --api-key (or --keys) and --admin-key, "
                "or say --insecure to serve without them"
            )
        if self.keys is not None and self.api_key is None and self.admin_key is None:
            raise ValueError("--keys: set --admin-key as well; without one anybody may change adapters")
        read_keys(self.keys)
        if self.ngram_max < self.ngram_min:
            raise ValueError(f"ngram_max is {self.ngram_max}, below ngram_min, {self.ngram_min}")
        if self.overlap and (self.speculate != "off" or self.deterministic):
            raise ValueError("overlap: a step with drafts, or a deterministic one, starts when the last one has ended")
        if self.max_inflight_seqs < self.max_num_seqs:
            raise ValueError(
                f"max_inflight_seqs is {self.max_inflight_seqs}, below max_num_seqs, {self.max_num_seqs}: "
                "so many could never run at once"
            )
        _ = self.sources  # checks its entries
        for name in self.adapters:
            if name == self.base_name:
                raise ValueError(f"--adapter: {name} is the served name of the base model")
        return self

    @property
    def base_name(self) -> str:
        """What requests call the base: --served-model-name, or a local folder's name, or the model id as given."""
        if self.served_model_name:
            return self.served_model_name
        path = Path(self.model)
        return path.resolve().name if path.is_dir() else self.model

    @property
    def adapters(self) -> dict[str, Path]:
        """--adapter NAME=FOLDER as name -> folder."""
        return dict(_split_adapter(item) for item in self.adapter)

    @property
    def sources(self) -> SourceOptions:
        """Where adapters may come from besides uploads. Raises ValueError, which names the option."""
        from onebase.adapters.sources import SourceOptions  # brings torch along, which most commands do without

        return SourceOptions(
            allow_path=self.allow_path,
            allow_hub=self.allow_hub,
            allow_bucket=self.allow_bucket,
            allow_url=self.allow_url,
            resolver=self.resolver,
        )

    @property
    def max_upload_bytes(self) -> int:
        return int(self.max_upload_gib * GIB)

    def engine_config(self) -> EngineConfig:
        return EngineConfig(
            model=self.model,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            dtype=self.dtype,
            device=self.device,
            max_model_len=self.max_model_len,
            max_batch_tokens=self.max_batch_tokens,
            max_num_seqs=self.max_num_seqs,
            tenant_weights=read_keys(self.keys).weights,
            max_step_stretch=self.max_step_stretch,
            prefix_caching=self.prefix_caching,
            deterministic=self.deterministic,
            overlap=self.overlap,
            cuda_graphs=self.cuda_graphs,
            speculate=self.speculate,
            speculative_tokens=self.speculative_tokens,
            ngram_min=self.ngram_min,
            ngram_max=self.ngram_max,
            kv_dtype=self.kv_dtype,
            device_memory=self.device_memory,
            kv_memory=_least(self.kv_memory),
            kv_memory_max=_most(self.kv_memory),
            adapter_memory=_least(self.adapter_memory),
            adapter_memory_max=_most(self.adapter_memory),
            host_cache=self.host_cache,
            compiled_cache=self.compiled_cache,
            compiled_dir=str(self.data_dir / COMPILED),
        )


def is_loopback(host: str) -> bool:
    """True for localhost and loopback addresses; any other name may resolve to anything."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def load_settings(given: dict[str, Any], config: Path | None = None) -> Settings:
    """Settings from the options that were given, the environment and, if named, a TOML file.

    Raises pydantic.ValidationError (an unknown key in the file included) and OSError or tomllib.TOMLDecodeError for
    a file that cannot be read.
    """
    if config is not None and not config.is_file():
        raise FileNotFoundError(f"--config: {config} is not a file")

    class Sources(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            if config is None:
                return init_settings, env_settings
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=config)

    return Sources(**given)


def _folder(path: Path, option: str) -> Path:
    if not path.is_dir():
        raise ValueError(f"{option}: {path} is not a folder")
    return path.resolve()


def _least(memory: MemoryRange | None) -> float | None:
    return None if memory is None else memory.least


def _most(memory: MemoryRange | None) -> float | None:
    return None if memory is None else memory.most


def _split_adapter(item: str) -> tuple[str, Path]:
    name, separator, folder = item.partition("=")
    if not separator or not folder:
        raise ValueError(f"--adapter: {item!r} is not NAME=FOLDER")
    try:
        return check_name(name), Path(folder).expanduser()
    except AdapterNameInvalid as error:
        raise ValueError(f"--adapter: {error.message}") from error
