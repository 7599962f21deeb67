"""The Hugging Face Hub: a revision becomes a commit first, then the files are fetched at that commit.

Endpoint, token, proxies and certificates are those of huggingface_hub (HF_ENDPOINT, HF_TOKEN, ...), whose session does
the requests. Its cache is not used: files go from the network to the stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from onebase.adapters.errors import AdapterNotFound, AdapterRejected, SourceFailed
from onebase.adapters.sources.answers import check_status, content_length
from onebase.adapters.sources.intake import Intake, wanted_files
from onebase.adapters.sources.location import Repo, check_revision

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_COMMIT = re.compile(r"[0-9a-f]{40}")
_IDENTITY = {"Accept-Encoding": "identity"}


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """A folder of a repository at a commit. files: as its listing has them, relative to the folder."""

    repo: Repo
    commit: str
    files: tuple[str, ...]

    def path(self, name: str) -> str:
        return f"{self.repo.subfolder}/{name}" if self.repo.subfolder else name


class HubSource:
    """``hf://org/name``, with ``@revision`` and a subfolder if need be."""

    def __init__(self, allowed: Sequence[str], endpoint: str | None = None) -> None:
        """allowed: see SourceOptions.allow_hub. endpoint: None is huggingface_hub's own."""
        self._allowed = allowed
        self._endpoint = endpoint

    def check(self, source: str, revision: str | None) -> None:
        self._parse(source, revision)

    def fetch(self, source: str, revision: str | None, intake: Intake) -> str:
        """Returns the commit."""
        from huggingface_hub import HfApi

        repo, revision = self._parse(source, revision)
        api = HfApi(endpoint=self._endpoint, library_name="onebase")
        with _readable(repo):
            snapshot = _resolve(api, repo, revision, intake.patience.left())
            for name in wanted_files(snapshot.files):
                _download(api, snapshot, name, intake)
        return snapshot.commit

    def _parse(self, source: str, revision: str | None) -> tuple[Repo, str | None]:
        if not self._allowed:
            raise AdapterRejected("Loading from the Hugging Face Hub is off; --allow-hub turns it on.", param="source")
        repo = Repo.parse(source)
        if not {"*", repo.org, repo.id} & set(self._allowed):
            raise AdapterRejected(f"{repo.id} is not below an --allow-hub.", param="source")
        if revision is not None and repo.revision not in {None, check_revision(revision)}:
            raise AdapterRejected("revision: the source names another one.", param="revision")
        return repo, revision or repo.revision


def _resolve(api: HfApi, repo: Repo, revision: str | None, timeout: float) -> _Snapshot:
    try:
        info = api.model_info(repo.id, revision=revision, timeout=timeout)
        commit = str(info.sha)
        listed = [str(item.rfilename) for item in info.siblings or ()]
    except (KeyError, TypeError, ValueError) as error:
        raise _not_understood(repo) from error
    if not _COMMIT.fullmatch(commit):
        raise SourceFailed(f"The Hub named no commit for {repo.id}.", param="source")
    folder = f"{repo.subfolder}/" if repo.subfolder else ""
    names = (path.removeprefix(folder) for path in listed if path.startswith(folder))
    files = tuple(name for name in names if "/" not in name)
    if folder and not files:
        raise AdapterNotFound(f"{repo.id} has no folder {repo.subfolder}.", param="source")
    return _Snapshot(repo, commit, files)


def _download(api: HfApi, snapshot: _Snapshot, name: str, intake: Intake) -> None:
    """A redirect to the Hub's file servers is followed; the session takes the token off for another host."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, and loaded lazily

    url = hf_hub_url(snapshot.repo.id, snapshot.path(name), revision=snapshot.commit, endpoint=api.endpoint)
    headers = build_hf_headers(library_name="onebase") | _IDENTITY
    timeout = intake.patience.left()
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        check_status(response.status_code, name)
        intake.write(name, response.iter_raw(), content_length(name, response.headers))


@contextmanager
def _readable(repo: Repo) -> Iterator[None]:
    """The library's errors as ours. Their texts are not repeated: they hold addresses that may be signed."""
    from huggingface_hub import errors

    # HTTPError of httpx or of httpx2, as the library's version has it
    network = cast(type[Exception], errors.HfHubHTTPError.__mro__[1])
    try:
        yield
    except errors.GatedRepoError as error:
        raise AdapterRejected(f"{repo.id} is gated, and HF_TOKEN gives no access to it.", param="source") from error
    except errors.RepositoryNotFoundError as error:
        raise AdapterNotFound(
            f"The Hub has no repository {repo.id}, or it is private and HF_TOKEN gives no access to it.", param="source"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise AdapterNotFound(f"{repo.id} has no such revision.", param="revision") from error
    except errors.OfflineModeIsEnabled as error:
        raise SourceFailed("HF_HUB_OFFLINE is set: the Hub is not asked.", param="source") from error
    except errors.HfHubHTTPError as error:
        check_status(error.response.status_code, repo.id)
        raise _not_understood(repo) from error
    except network as error:
        raise SourceFailed(f"The Hub cannot be reached: {type(error).__name__}.", param="source") from error


def _not_understood(repo: Repo) -> SourceFailed:
    return SourceFailed(f"The Hub's answer about {repo.id} is not understood.", param="source")
