"""Adapters as the API shows them: what a version is, where it is, and how the last import of its name went."""

from __future__ import annotations

from typing import Any

from onebase.adapters.registry import AdapterEntry, AdapterState, GcReport, Import
from onebase.serve.api.state import Server

Card = dict[str, Any]


def adapter_card(server: Server, entry: AdapterEntry, job: Import | None = None) -> Card:
    """A version. job: the name's last import; while that is under way, or if it failed since, the state is its own."""
    news = job if job is not None and _is_news(job, entry) else None
    return {
        "name": entry.name,
        "object": "adapter",
        "version": entry.version,
        "digest": entry.digest,
        "family": entry.family,
        "rank": entry.rank,
        "bytes": entry.nbytes,
        "source": entry.source,
        "revision": entry.revision,
        "created": int(entry.created),
        "by": entry.created_by,
        "state": AdapterState.READY if news is None else news.state,
        "reason": None if news is None else news.reason or None,
        "pinned": entry.pinned,
        "labels": dict(entry.labels),
        "aliases": list(entry.aliases),
        "tier": server.engine.tier(entry.digest),
        "uses": server.require_loaded().store.uses.of(entry.name, entry.version),
    }


def _is_news(job: Import, entry: AdapterEntry) -> bool:
    return not job.state.finished or (job.state is AdapterState.FAILED and job.created > entry.created)


def import_card(job: Import) -> Card:
    """A name that has no version yet: what is known of it while its files are on their way, or could not be had."""
    unknown = dict.fromkeys(("version", "digest", "family", "rank", "bytes"))
    return {
        "name": job.name,
        "object": "adapter",
        **unknown,
        "source": job.source,
        "revision": job.revision,
        "created": int(job.created),
        "by": job.by,
        "state": job.state,
        "reason": job.reason or None,
        "pinned": False,
        "labels": {},
        "aliases": [],
        "tier": "disk",
        "uses": 0,
    }


def report_card(report: GcReport, *, dry_run: bool) -> Card:
    return {
        "object": "gc_report",
        "dry_run": dry_run,
        "versions": [f"{entry.name}@{entry.version}" for entry in report.versions],
        "imports": report.imports,
        "blobs": list(report.blobs),
        "compiled": list(report.compiled),
        "bytes": report.nbytes,
    }
