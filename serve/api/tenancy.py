"""Whose an engine request is."""

from __future__ import annotations

from dataclasses import replace

from onebase.serve.engine.messages import Request
from onebase.serve.tenants import Tenant


def owned(request: Request, tenant: Tenant) -> Request:
    """The request as its tenant's: no more urgent than the tenant may be."""
    least = request.priority if tenant.priority is None else tenant.priority
    return replace(request, tenant=tenant.name, priority=max(request.priority, least))
