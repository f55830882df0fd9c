"""What the catalog knows of an adapter, and on whose behalf it is asked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from shoal.adapters.spec import Family

Source = Literal["upload", "shipped"]


@dataclass(frozen=True, slots=True)
class Scope:
    """Who asks, and of the adapters for which base."""

    owner: str
    base_digest: str


@dataclass(frozen=True, slots=True)
class Content:
    """What one version consists of.

    Attributes:
        digest: sha256 (hex) of the canonical record.
        bytes: length of the canonical record.
        packed_elements: elements it takes in the device bank.
        basis_id: what its family's matrices are written in; not that of a base correction, which
            is in the record.
    """

    digest: str
    family: Family
    format: str
    rank: int
    bytes: int
    packed_elements: int
    basis_id: str | None


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One version of an adapter.

    Attributes:
        created: unix time in seconds; of the version, not of its name.
        active: whether the bare name meant this version when it was read.
        owner: whose it is; '' while there are no keys.
        tags: of the name, not of the version.
        used: unix time of the name's last use, to a minute or so; None if there was none.
    """

    name: str
    version: int
    digest: str
    family: Family
    format: str
    rank: int
    bytes: int
    created: float
    active: bool
    basis_id: str | None
    packed_elements: int
    owner: str = ""
    tags: Mapping[str, str] = field(default_factory=dict, hash=False)
    used: float | None = None

    @property
    def reference(self) -> str:
        """``owner/name``, or the bare name where there are no owners: unique in the registry."""
        return f"{self.owner}/{self.name}" if self.owner else self.name
