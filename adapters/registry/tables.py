"""The catalog's tables. Portable SQL; ``SCHEMA_VERSION`` goes up with every change here."""

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

SCHEMA_VERSION = 1

METADATA = MetaData()

# Names are compared byte by byte everywhere: prefix search is a range over them.
_Name = String(128).with_variant(String(128, collation="C"), "postgresql")
# SQLite counts up only in a column declared INTEGER.
_Id = BigInteger().with_variant(Integer, "sqlite")

SCHEMA = Table("shoal_schema", METADATA, Column("version", Integer, primary_key=True))

# One row per (owner, name), for ever: a deleted name keeps its row, so that no version number
# is given out twice. Versions below `live_from` were deleted with the name and never come back.
ADAPTERS = Table(
    "adapters",
    METADATA,
    Column("id", _Id, primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("name", _Name, nullable=False),
    Column("base_digest", String(64), nullable=False),
    Column("active_version", Integer, nullable=False),
    Column("next_version", Integer, nullable=False),
    Column("live_from", Integer, nullable=False),
    Column("deleted_at", Double, nullable=True),
    UniqueConstraint("owner", "name", name="adapters_owner_name"),
)

# What is listed: live names of one base, in order. Partial, so tombstones cost a listing nothing.
LIVE = Index(
    "adapters_live",
    ADAPTERS.c.owner,
    ADAPTERS.c.base_digest,
    ADAPTERS.c.name,
    sqlite_where=ADAPTERS.c.deleted_at.is_(None),
    postgresql_where=ADAPTERS.c.deleted_at.is_(None),
)

# Rows are only ever inserted: a version never changes.
VERSIONS = Table(
    "versions",
    METADATA,
    Column("adapter_id", _Id, ForeignKey("adapters.id"), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("family", String(16), nullable=False),
    Column("format", String(32), nullable=False),
    Column("rank", Integer, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("packed_elements", BigInteger, nullable=False),
    Column("basis_id", String(64), nullable=True),
    Column("base_digest", String(64), nullable=False),
    Column("source", String(16), nullable=False),
    Column("created", Double, nullable=False),
    Index("versions_digest", "adapter_id", "digest"),
)

# How many names are live. Counting a million index entries takes 0.3 s, and /metrics asks often.
TOTALS = Table(
    "totals",
    METADATA,
    Column("owner", String(128), primary_key=True),
    Column("base_digest", String(64), primary_key=True),
    Column("names", Integer, nullable=False),
)
