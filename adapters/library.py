"""``AdapterLibrary``: everything HTTP and the command line do with adapters.

Joins the readers of formats (files -> validated weights), the registry (durable records by name
and version) and the host tier (packed weights, pinned while a request needs them). It decides the
order in which those happen, so that what is refused, or fails half-way, leaves nothing behind that
a caller can see. Knows nothing of HTTP, the engine or the device.
"""

import logging
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from shoal.adapters.apart import Asked, Helpers, make_setup
from shoal.adapters.basis import Basis, BasisStore
from shoal.adapters.blending import Blend
from shoal.adapters.composing import Base, compose
from shoal.adapters.errors import AdapterError, AdapterRejected, BlendRefused
from shoal.adapters.formats.config_fields import CONFIG_FILE
from shoal.adapters.host_tier import HostTier
from shoal.adapters.layouts import Layouts
from shoal.adapters.packing import PackedAdapter
from shoal.adapters.preparing import Packing
from shoal.adapters.reading import adapter_files, read_adapter
from shoal.adapters.record import from_record
from shoal.adapters.registry.catalog import AdapterInfo
from shoal.adapters.registry.collecting import Collector
from shoal.adapters.registry.errors import RecordDamaged, RegistryError, RegistryUnavailable
from shoal.adapters.registry.keys import Keys, Limits
from shoal.adapters.registry.registry import Address, Registry
from shoal.adapters.registry.store import Places, places
from shoal.adapters.spec import AdapterSpec, BaseShape, Target
from shoal.adapters.spectral_basis import SpectralBasis
from shoal.adapters.spectral_probe import ERROR_MAX, changed_target
from shoal.adapters.weights import AdapterWeights, Term, WeightOf

__all__ = [
    "AdapterInfo",
    "AdapterLibrary",
    "Places",
    "RegistryError",
    "RegistryUnavailable",
    "places",
]

# How many bases uploads may bring beside the canonical one: each widens the base's GEMMs.
UPLOADED_BASES_MAX = 4
# How many blends are composed at a time; those that are resident wait for nobody.
COMPOSING_MAX = 2

log = logging.getLogger(__name__)

Page = tuple[list[AdapterInfo], str | None]
History = list[AdapterInfo]
OnSpectral = Callable[[SpectralBasis, Collection[Target]], None]


class AdapterLibrary:
    """The adapters of one base. All methods block and are thread-safe; see ``open``.

    ``owner`` is on whose behalf a method is called: see ``Registry``.

    Besides what each method names, all may raise ``RegistryError`` (database or store failed).
    """

    def __init__(
        self,
        registry: Registry,
        *,
        address: Address | None = None,
        shape: BaseShape,
        weight_of: WeightOf,
        canonical: Basis,
        bases: BasisStore,
        host: HostTier,
        on_basis: Callable[[Basis], None],
        dtype: torch.dtype,
        max_upload_bytes: int,
        max_packed_bytes: int | None = None,
        max_bases: int = UPLOADED_BASES_MAX,
        spectral: SpectralBasis | None = None,
        on_spectral: OnSpectral | None = None,
    ) -> None:
        self._registry = registry
        self._address = address
        self._shape = shape
        self._weight_of = weight_of
        self._canonical = canonical
        self._bases = bases
        self._host = host
        self._on_basis = on_basis
        self._max_upload_bytes = max_upload_bytes
        self._packing = Packing(
            shape, dtype, min(host.capacity_bytes, max_packed_bytes or host.capacity_bytes)
        )
        self._max_bases = max_bases
        self._spectral = spectral
        self._on_spectral = on_spectral
        self._layouts = Layouts(shape, dtype)
        self._loading = _KeyedLocks()
        self._helpers: Helpers | None = None
        self._collector = Collector(lambda stopping: registry.collect(stopping=stopping))
        self._composing = threading.BoundedSemaphore(COMPOSING_MAX)

    @classmethod
    def open(
        cls,
        *,
        registry_url: str,
        store_url: str | None,
        shape: BaseShape,
        weight_of: WeightOf,
        canonical: Basis,
        bases: BasisStore,
        host: HostTier,
        on_basis: Callable[[Basis], None],
        dtype: torch.dtype,
        reserved_names: frozenset[str],
        max_upload_bytes: int,
        shipped: Path | None,
        max_packed_bytes: int | None = None,
        max_bases: int = UPLOADED_BASES_MAX,
        spectral: SpectralBasis | None = None,
        on_spectral: OnSpectral | None = None,
    ) -> "AdapterLibrary":
        """Open or create a registry for the base that is being served.

        Args:
            registry_url: SQLAlchemy URL of the catalog.
            store_url: fsspec URL of the store; None is the default place.
            shape, weight_of, canonical: the base, its weights and its canonical basis.
            bases: uploaded bases, those of ``SharedBases.open(places(registry_url, store_url))``.
            host: where packed adapters live; this library loads and pins, the engine only reads.
            on_basis: told of a basis before an adapter that needs it is in the host tier. May be
                called again for one it knows, from any thread.
            dtype: of packed adapters: that of the device bank.
            reserved_names: names no adapter may have, such as the base's.
            max_upload_bytes: limit on the files of one upload together.
            shipped: a folder of adapter folders that appear under their folder's names, unless a
                user replaced or deleted that name.
            max_packed_bytes: size of the device bank; what is larger could never run.
            max_bases: how many uploaded bases to keep before adapters are served as ``lora``.
            spectral: the base's singular vectors; None refuses the adapters that need them.
            on_spectral: told of the targets whose vectors an adapter needs, before it is in the
                host tier, as ``on_basis``. May raise AdapterTooLarge.

        Raises:
            RegistryUnavailable, SchemaTooNew: the registry cannot be opened.
        """
        where = places(registry_url, store_url)
        address = Address(registry_url, where.store_url, shape.digest, reserved_names)
        library = cls(
            address.open(),
            address=address,
            shape=shape,
            weight_of=weight_of,
            canonical=canonical,
            bases=bases,
            host=host,
            on_basis=on_basis,
            dtype=dtype,
            max_upload_bytes=max_upload_bytes,
            max_packed_bytes=max_packed_bytes,
            max_bases=max_bases,
            spectral=spectral,
            on_spectral=on_spectral,
        )
        try:
            if shipped is not None:
                library._publish_shipped(shipped)
        except BaseException:
            library.close()
            raise
        library._collector.start()
        return library

    def prepare_apart(self, processes: int, *, ahead: bool = False) -> None:
        """From now on let so many helper processes do uploads; see ``apart.Helpers``.

        Not those of a registry that only this process can open.
        """
        if self._address is None or not self._address.reachable:
            return
        setup = partial(
            make_setup,
            self._address,
            self._packing,
            self._canonical,
            max_bytes=self._max_upload_bytes,
            max_bases=self._max_bases,
            spectral=self._spectral is not None,
        )
        self._helpers = Helpers(setup, processes, ahead=ahead)

    def upload(
        self,
        name: str,
        files: Mapping[str, Path],
        *,
        owner: str = "",
        limits: Limits | None = None,
    ) -> AdapterInfo:
        """Validate an adapter, store it and make it what ``name`` means.

        When this returns, the adapter is durable and the next request can use it. When it raises,
        no name or version has changed. Content that ``name`` already has becomes active again as
        the version it is.

        Args:
            files: file name -> where it lies, such as ``adapter_config.json``. Not kept.
            limits: of adapters and bytes that the owner may have; None is no limit.

        Raises:
            AdapterNameInvalid, AdapterConflict, AdapterQuotaExceeded, AdapterRejected,
            AdapterTooLarge.
        """
        info = self._upload_apart(Asked(name=name, owner=owner, limits=limits, files=files))
        if info is None:
            self._registry.claim(name, owner=owner, limits=limits)
            weights = self._read(files, self._bases)
            prepared = self._packing.prepare(weights)
            self._registry.claim(name, owner=owner, content=prepared.content, limits=limits)
            self._place(prepared.packed, (weights,))
            info = self._registry.publish(
                name, prepared.content, prepared.record, owner=owner, limits=limits, claimed=True
            )
        log.info("uploaded adapter=%s@%d digest=%s", info.reference, info.version, info.digest)
        return info

    def check(self, files: Mapping[str, Path]) -> AdapterWeights:
        """What an upload of ``files`` would be served as; changes nothing.

        Copies the known bases to a temporary folder: not for a server's every request.

        Raises:
            AdapterRejected, AdapterTooLarge.
        """
        with tempfile.TemporaryDirectory(prefix="shoal-check-") as folder:
            trial = BasisStore(Path(folder))
            for basis in self._bases.all():
                trial.add(basis)
            weights = self._read(files, trial)
        self._packing.prepare(weights)
        return weights

    def resolve(self, model: str, *, owner: str = "") -> AdapterInfo:
        """What ``name`` or ``name@version`` means now, or AdapterNotFound."""
        return self._registry.resolve(model, owner=owner)

    def stage(self, info: AdapterInfo) -> AdapterSpec:
        """Have the adapter packed and pinned in the host tier; ``unstage`` it once afterwards.

        Works for every version that was ever resolved, also when it is no longer active.

        Raises:
            AdapterTooLarge: it does not fit beside what is pinned.
            RecordDamaged: its bytes or its basis are gone or have changed.
        """
        if not self._host.pin(info.digest):
            with self._loading.held(info.digest):
                self._load_and_pin(info)
        self._registry.note_use(info)
        return self._host.get(info.digest).spec

    def stage_resident(self, wanted: AdapterInfo | Blend[AdapterInfo]) -> AdapterSpec | None:
        """``stage`` of what is in the host tier; None when it is not. Waits for no disk."""
        if not self._host.pin(wanted.digest):
            return None
        parts = [info for info, _ in wanted.parts] if isinstance(wanted, Blend) else [wanted]
        for info in parts:
            self._registry.note_use(info)
        return self._host.get(wanted.digest).spec

    def stage_blend(self, blend: Blend[AdapterInfo]) -> AdapterSpec:
        """As ``stage``, a weighted sum; composed once, however many ask.

        Its adapters are read from the store and are not put in the host tier: the sum is rounded
        once, from what they are there.

        Raises:
            BlendRefused: it cannot be served.
            AdapterTooLarge, RecordDamaged: as ``stage``.
        """
        if not self._host.pin(blend.digest):
            with self._loading.held(blend.digest):
                self._compose_and_pin(blend)
        for info, _ in blend.parts:
            self._registry.note_use(info)
        return self._host.get(blend.digest).spec

    def unstage(self, spec: AdapterSpec) -> None:
        """Undo one ``stage``: the host tier may forget the adapter when nobody else needs it."""
        self._host.unpin(spec.digest)

    def list(
        self, *, limit: int, after: str | None = None, prefix: str = "", owner: str = ""
    ) -> Page:
        """Active versions by name, at most ``limit`` (from 1) behind ``after``; and the next
        ``after``, or None at the end. AdapterNameInvalid when ``after`` is not a name."""
        return self._registry.page(limit=limit, after=after, prefix=prefix, owner=owner)

    def list_shared(self, *, limit: int, after: str | None = None, owner: str = "") -> Page:
        """As ``list``, what others share with ``owner``; ``after`` is ``owner/name``."""
        return self._registry.shared_page(limit=limit, after=after, owner=owner)

    def versions(self, name: str, *, owner: str = "") -> History:
        """Every version of ``name``, oldest first, or AdapterNotFound."""
        return self._registry.versions(name, owner=owner)

    def activate(self, name: str, version: int, *, owner: str = "") -> AdapterInfo:
        """Let ``name`` mean ``version``, or AdapterNotFound."""
        return self._registry.activate(name, version, owner=owner)

    def tag(self, name: str, tags: Mapping[str, str], *, owner: str = "") -> AdapterInfo:
        """Give ``name`` these tags and no others, or AdapterNotFound, AdapterRejected."""
        return self._registry.tag(name, tags, owner=owner)

    def share(self, name: str, grantee: str | None, *, owner: str) -> None:
        """Let ``grantee``, or everybody, see ``name``, or AdapterNotFound, AdapterRejected."""
        self._registry.share(name, grantee, owner=owner)

    def unshare(self, name: str, grantee: str | None, *, owner: str) -> None:
        """Undo ``share``, or AdapterNotFound, AdapterRejected."""
        self._registry.unshare(name, grantee, owner=owner)

    def grantees(self, name: str, *, owner: str) -> Sequence[str | None]:
        """With whom ``name`` is shared; None is everybody. AdapterNotFound."""
        return self._registry.grantees(name, owner=owner)

    def delete(self, name: str, *, owner: str = "") -> None:
        """Forget ``name`` and its versions, or AdapterNotFound. Running requests are not harmed."""
        self._registry.delete(name, owner=owner)

    def count(self, *, owner: str = "") -> int:
        """How many names ``owner`` has."""
        return self._registry.count(owner=owner)

    @property
    def keys(self) -> Keys:
        """The API keys of those who work with the adapters."""
        return self._registry.keys

    def close(self) -> None:
        """Close the database. Nothing may be called afterwards."""
        if self._helpers is not None:
            self._helpers.close()
        self._collector.close()
        self._registry.close()

    def _read(self, files: Mapping[str, Path], bases: BasisStore) -> AdapterWeights:
        with _disk_failures():
            return read_adapter(
                files,
                shape=self._shape,
                weight_of=self._weight_of,
                bases=bases,
                canonical=self._canonical,
                max_bytes=self._max_upload_bytes,
                max_bases=self._max_bases,
                spectral=self._spectral,
            )

    def _upload_apart(self, asked: Asked) -> AdapterInfo | None:
        """Have a helper process do it; None when it must be done here."""
        if self._helpers is None:
            return None
        with _disk_failures():
            return self._helpers.upload(
                asked,
                self._bases.all(),
                place=self._place,
                published=self._registry.published_elsewhere(asked.name, owner=asked.owner),
            )

    def _place(self, packed: PackedAdapter, weights: Sequence[AdapterWeights] = ()) -> None:
        """Make an adapter ready to be used. Before its name exists: what cannot be gets none."""
        self._keep_basis(packed.spec)
        self._announce(packed.spec, weights)
        self._host.put(packed)

    def _load_and_pin(self, info: AdapterInfo) -> None:
        if self._host.pin(info.digest):
            return  # another thread loaded it while we waited
        record = self._registry.read(info.digest)
        parts: list[AdapterWeights] = []
        with _unusable(info.digest):
            packed = self._layouts.pack(record, info.digest)
        if packed is None:
            with _unusable(info.digest):
                weights = from_record(record, self._shape)
            packed = self._packing.pack(weights, info.digest)
            self._layouts.learn(record, weights, packed)
            parts.append(weights)
        self._announce(packed.spec, parts)
        self._host.put(packed, pin=True)

    def _compose_and_pin(self, blend: Blend[AdapterInfo]) -> None:
        if self._host.pin(blend.digest):
            return  # another thread composed it while we waited
        # So that those composed at a time take at most as much again as the host tier.
        size, most = sum(info.bytes for info, _ in blend.parts), self._host.capacity_bytes
        most //= COMPOSING_MAX
        if size > most:
            raise BlendRefused(
                f"the blend's adapters take {size} bytes together, this server blends up to "
                f"{most}; {_largest(blend)} is the largest"
            )
        with self._composing:
            terms = [Term(self._stored(info.digest), weight) for info, weight in blend.parts]
            packed = compose(
                terms,
                [f"{info.reference}@{info.version}" for info, _ in blend.parts],
                blend.digest,
                Base(self._shape, self._weight_of, self._basis),
                dtype=self._packing.dtype,
                max_bytes=self._packing.max_bytes,
            )
            self._announce(packed.spec, [weights for weights, _ in terms])
        self._host.put(packed, pin=True)

    def _stored(self, digest: str) -> AdapterWeights:
        record = self._registry.read(digest)
        with _unusable(digest):
            return from_record(record, self._shape)

    def _keep_basis(self, spec: AdapterSpec) -> None:
        """Keep the canonical basis with the first adapter on it.

        It comes from a cache, and may be computed again with other bits or another rank; the
        registry's adapters must outlive that.
        """
        if any(section.basis_id == self._canonical.id for section in spec.sections):
            with _disk_failures():
                self._bases.add(self._canonical)

    def _announce(self, spec: AdapterSpec, parts: Sequence[AdapterWeights]) -> None:
        """Give the bases that an adapter needs to whoever multiplies by them.

        Args:
            parts: what it was packed from; what is ``core`` alone need not be among them.

        Always before it enters the host tier: whatever is in there can be staged as it is.
        """
        for section in spec.sections:
            if section.kind == "core" and section.basis_id is not None:
                basis = self._basis(section.basis_id)
                if section.rank > basis.rank:
                    raise RecordDamaged(
                        f"record {spec.digest} wants {section.rank} columns of basis {basis.id}, "
                        f"which has {basis.rank}"
                    )
                self._on_basis(basis)
        for weights in parts:
            if weights.family == "spectral":
                self._announce_vectors(weights.basis_id, weights, spec.digest)

    def _announce_vectors(self, basis_id: str | None, weights: AdapterWeights, digest: str) -> None:
        basis = self._spectral
        if basis is None or basis.id != basis_id or self._on_spectral is None:
            known = "none" if basis is None else basis.id
            raise RecordDamaged(f"the adapter needs singular vectors {basis_id}, there are {known}")
        with _disk_failures():
            self._on_spectral(basis, weights.tensors.keys())
            # After it has them, so that these are the vectors that will serve.
            changed = changed_target(weights, basis)
        if changed is not None:
            target, error = changed
            raise RecordDamaged(
                f"the base's singular vectors are no longer those that adapter {digest} was read "
                f"with: on {target} its probe differs by {error:.1e}, must be within "
                f"{ERROR_MAX:.0e}; uploading the adapter again mends it, or is "
                "refused if its file tells those vectors by probes"
            )

    def _basis(self, basis_id: str) -> Basis:
        if basis_id == self._canonical.id:
            return self._canonical
        try:
            basis = self._bases.find(basis_id, self._shape)
        except (OSError, AdapterRejected) as error:
            raise RecordDamaged(f"basis {basis_id} cannot be read: {error}") from error
        if basis is None:
            raise RecordDamaged(f"basis {basis_id} is missing")
        return basis

    def _publish_shipped(self, shipped: Path) -> None:
        for folder in sorted(path.parent for path in shipped.glob(f"*/{CONFIG_FILE}")):
            try:
                weights = self._read(adapter_files(folder), self._bases)
                prepared = self._packing.prepare(weights)
                self._keep_basis(prepared.packed.spec)
                info = self._registry.publish_shipped(
                    folder.name, prepared.content, prepared.record
                )
            except AdapterError as error:
                # A broken folder must not keep the server from starting.
                log.warning("shipped adapter left out folder=%s error=%s", folder, error)
                continue
            if info is not None:
                log.info("shipped adapter=%s@%d", info.name, info.version)


def _largest(blend: Blend[AdapterInfo]) -> str:
    largest, _ = max(blend.parts, key=lambda part: part[0].bytes)
    return repr(f"{largest.reference}@{largest.version}")


@contextmanager
def _disk_failures() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RegistryUnavailable(f"a file could not be read or written: {error}") from error


@contextmanager
def _unusable(digest: str) -> Iterator[None]:
    """A stored record was accepted once, so what is wrong with it is not the caller's mistake."""
    try:
        yield
    except AdapterRejected as error:
        raise RecordDamaged(f"record {digest} is unusable: {error}") from error


@dataclass(slots=True)
class _KeyedLock:
    """One of ``_KeyedLocks``.

    Attributes:
        users: who hold or await it.
        came: how many ever have.
        failure, failed: what the last holder could not reach, and who had come until then.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0
    came: int = 0
    failure: RegistryUnavailable | None = None
    failed: int = 0


class _KeyedLocks:
    """One lock per key, kept only while somebody holds or awaits it.

    When the holder fails because the registry is away, so do those who waited for it meanwhile:
    one after another, they would wait as long as all of them together.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[str, _KeyedLock] = {}

    @contextmanager
    def held(self, key: str) -> Iterator[None]:
        with self._guard:
            entry = self._locks.setdefault(key, _KeyedLock())
            entry.users += 1
            entry.came += 1
            number = entry.came
        try:
            with entry.lock:
                if entry.failure is not None and number <= entry.failed:
                    raise RegistryUnavailable(str(entry.failure)) from entry.failure
                try:
                    yield
                except RegistryUnavailable as error:
                    entry.failure, entry.failed = error, entry.came
                    raise
        finally:
            with self._guard:
                entry.users -= 1
                if not entry.users:
                    del self._locks[key]
