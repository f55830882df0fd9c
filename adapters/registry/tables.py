"""The catalog's tables, as the newest migration leaves them.

Portable SQL. ``SCHEMA_VERSION`` goes up with every change here, and ``migrations/versions`` gets a
file that makes the same change to the version before; a test compares the two.
"""

from sqlalchemy import (
    JSON,
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

SCHEMA_VERSION = 3

METADATA = MetaData()

# Names are compared byte by byte everywhere: prefix search is a range over them.
_Name = String(128).with_variant(String(128, collation="C"), "postgresql")
# SQLite counts up only in a column declared INTEGER.
_Id = BigInteger().with_variant(Integer, "sqlite")

# Beside Alembic's own table: releases from before Alembic refuse a newer schema by this number.
SCHEMA = Table("shoal_schema", METADATA, Column("version", Integer, primary_key=True))

# One row per (owner, name), for ever: a deleted name keeps its row, so that no version number
# is given out twice. Versions below `live_from` were deleted with the name and never come back.
# `used` is coarse (`usage.py`).
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
    Column("tags", JSON, nullable=False, server_default="{}"),
    Column("used", Double, nullable=True),
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

# A row never changes, and goes when its name is deleted.
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
    # By digest first: whether anybody still refers to some bytes is asked of all adapters.
    Index("versions_by_digest", "digest", "adapter_id"),
)

# How many names are live. Counting a million index entries takes 0.3 s, and /metrics asks often.
TOTALS = Table(
    "totals",
    METADATA,
    Column("owner", String(128), primary_key=True),
    Column("base_digest", String(64), primary_key=True),
    Column("names", Integer, nullable=False),
)

# What each owner has, of all bases; `bytes` are those of the canonical records of live versions,
# counted once for every version. Whoever changes an owner's adapters waits here (`totals.py`).
OWNERS = Table(
    "owners",
    METADATA,
    Column("owner", String(128), primary_key=True),
    Column("names", Integer, nullable=False),
    Column("bytes", BigInteger, nullable=False),
)

# Who besides its owner sees a live adapter; `grantee` is an owner, or `names.EVERYBODY`.
SHARES = Table(
    "shares",
    METADATA,
    Column("owner", _Name, primary_key=True),
    Column("name", _Name, primary_key=True),
    Column("grantee", _Name, primary_key=True),
    Index("shares_by_grantee", "grantee", "owner", "name"),
)

# Digests of deleted versions, with the time of the last such deletion or upload; some may be
# referred to again. Only what is here is ever collected (`garbage.py`).
GARBAGE = Table(
    "garbage",
    METADATA,
    Column("digest", String(64), primary_key=True),
    Column("since", Double, nullable=False, index=True),
)

KEYS = Table(
    "keys",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("secret_sha256", String(64), nullable=False),
    Column("role", String(16), nullable=False),
    Column("owner", String(128), nullable=False),
    Column("label", String(128), nullable=False),
    Column("created", Double, nullable=False),
    Column("revoked", Double, nullable=True),
    Column("limits", JSON, nullable=False),
)
