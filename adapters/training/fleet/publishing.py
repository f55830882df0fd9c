"""Puts finished adapters into a registry, in this process; servers on it serve them at once."""

from pathlib import Path

import torch

from shoal.adapters.basis import BasisStore
from shoal.adapters.host_tier import HostTier
from shoal.adapters.library import AdapterLibrary, places
from shoal.adapters.reading import adapter_files
from shoal.adapters.registry.shared_bases import SharedBases
from shoal.adapters.training.fleet.tenants import Tenant
from shoal.adapters.training.methods.source import Source

# Adapters pass through it on their way; none is served from here.
HOST_BYTES = 1 << 30


class RegistryPublisher:
    """A library on the registry, opened for the base that is trained on."""

    def __init__(
        self,
        source: Source,
        registry_url: str,
        store_url: str | None,
        *,
        reserved_names: frozenset[str] = frozenset(),
        max_upload_bytes: int = HOST_BYTES,
    ) -> None:
        """Open or create the registry.

        Args:
            source: the base.
            registry_url, store_url: as a server has them.
            reserved_names: names that no adapter may have.
            max_upload_bytes: of one adapter.

        Raises:
            RegistryUnavailable, SchemaTooNew: it cannot be opened.
        """
        shared = SharedBases.open(places(registry_url, store_url))
        self._library = AdapterLibrary.open(
            registry_url=registry_url,
            store_url=store_url,
            shape=source.shape,
            weight_of=source.weight_of,
            canonical=source.canonical,
            bases=BasisStore(shared.folder, shared),
            host=HostTier(HOST_BYTES),
            on_basis=lambda basis: None,
            dtype=torch.float32,
            reserved_names=reserved_names,
            max_upload_bytes=max_upload_bytes,
            shipped=None,
        )

    def publish(self, tenant: Tenant, directory: Path) -> str:
        """Upload an adapter directory under the tenant's name, and tag it.

        Raises:
            AdapterError: it is refused. RegistryError: the registry failed; trying again is safe.
        """
        files = adapter_files(directory)
        info = self._library.upload(tenant.name, files, owner=tenant.owner)
        if tenant.tags:
            self._library.tag(tenant.name, tenant.tags, owner=tenant.owner)
        return f"{info.reference}@{info.version}"

    def close(self) -> None:
        """Close the database."""
        self._library.close()
