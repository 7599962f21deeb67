"""Tokenizers and chat templates by adapter: the base's, or what an adapter brought with its files."""

from __future__ import annotations

import asyncio
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from onebase.serve.api.brought import codec_of, read_brought
from onebase.serve.api.errors import bad_request
from onebase.serve.api.rendering import Renderer
from onebase.serve.api.tokenizer import TextCodec, Workers

MAX_CODECS = 1024  # that are kept; all but a few share the base's tokenizer
PATIENCE = 3  # times in a row that a template may take too long
MAX_TOKENIZERS = 8  # of their own: 150,000 tokens take about 50 MB


class Codecs:
    """By the digest of the adapter's files, so that a replaced adapter never gets its predecessor's. Used on the event
    loop. Templates of adapters are rendered by a process of their own: one that is slow is in nobody's way who has the
    base's.
    """

    def __init__(self, base: TextCodec, workers: Workers, vocab_size: int) -> None:
        self.base = base
        self._workers = Workers(workers.encoders, Renderer(patience=PATIENCE))
        self._vocab_size = vocab_size
        self._kept: OrderedDict[str, TextCodec] = OrderedDict()
        self._loading: dict[str, asyncio.Task[TextCodec]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="onebase-")
        self._base_file = Path(self._folder.name) / "tokenizer.json"
        base.backend.save(str(self._base_file))

    async def check(self, folder: Path) -> None:
        """Whether what an adapter brings can be served. Raises AdapterRejected."""
        await self._read(folder)

    async def of(self, digest: str, folder: Path) -> TextCodec:
        """Its files stay while this runs. Raises AdapterRejected where the base has changed since they were checked."""
        if digest in self._kept:
            self._kept.move_to_end(digest)
            return self._kept[digest]
        task = self._loading.get(digest)
        if task is None:
            task = self._loading[digest] = asyncio.create_task(self._load(digest, folder))
        return await asyncio.shield(task)

    async def of_all(self, adapters: Sequence[tuple[str, Path]]) -> TextCodec:
        """Of adapters on one request, as (digest, folder): what the first one brings that brings anything. Raises
        ApiError 400 where their tokenizers differ."""
        own = [await self.of(*adapter) for adapter in adapters]
        own = [codec for codec in own if codec is not self.base]
        if len({id(codec.backend) for codec in own if codec.backend is not self.base.backend}) > 1:
            raise bad_request("The adapters bring different tokenizers: name them in separate requests.", "adapters")
        if not own:
            return self.base
        return next((codec for codec in own if codec.backend is not self.base.backend), own[0])

    def close(self) -> None:
        self._workers.renderer.close()
        self._folder.cleanup()

    async def _load(self, digest: str, folder: Path) -> TextCodec:
        try:
            codec = await self._read(folder)
        finally:
            del self._loading[digest]
        self._kept[digest] = codec
        own = [key for key, kept in self._kept.items() if kept.backend is not self.base.backend]
        for key in own[: max(0, len(own) - MAX_TOKENIZERS)]:
            del self._kept[key]
        while len(self._kept) > MAX_CODECS:
            self._kept.popitem(last=False)
        return codec

    async def _read(self, folder: Path) -> TextCodec:
        brought = await asyncio.get_running_loop().run_in_executor(self._workers.encoders, read_brought, folder)
        if brought.is_nothing:
            return self.base
        return await codec_of(brought, self.base, self._base_file, self._vocab_size, self._workers)
