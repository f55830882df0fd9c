"""Names, versions and totals: schema 1, which releases made before they had migrations."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_Name = sa.String(128).with_variant(sa.String(128, collation="C"), "postgresql")
_Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make the tables in an empty database."""
    op.create_table("shoal_schema", sa.Column("version", sa.Integer, primary_key=True))
    op.create_table(
        "adapters",
        sa.Column("id", _Id, primary_key=True),
        sa.Column("owner", sa.String(128), nullable=False),
        sa.Column("name", _Name, nullable=False),
        sa.Column("base_digest", sa.String(64), nullable=False),
        sa.Column("active_version", sa.Integer, nullable=False),
        sa.Column("next_version", sa.Integer, nullable=False),
        sa.Column("live_from", sa.Integer, nullable=False),
        sa.Column("deleted_at", sa.Double, nullable=True),
        sa.UniqueConstraint("owner", "name", name="adapters_owner_name"),
    )
    op.create_index(
        "adapters_live",
        "adapters",
        ["owner", "base_digest", "name"],
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )
    op.create_table(
        "versions",
        sa.Column("adapter_id", _Id, sa.ForeignKey("adapters.id"), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("family", sa.String(16), nullable=False),
        sa.Column("format", sa.String(32), nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("packed_elements", sa.BigInteger, nullable=False),
        sa.Column("basis_id", sa.String(64), nullable=True),
        sa.Column("base_digest", sa.String(64), nullable=False),
        sa.Column("source", sa.String(16), nullable=False),
        sa.Column("created", sa.Double, nullable=False),
    )
    op.create_index("versions_digest", "versions", ["adapter_id", "digest"])
    op.create_table(
        "totals",
        sa.Column("owner", sa.String(128), primary_key=True),
        sa.Column("base_digest", sa.String(64), primary_key=True),
        sa.Column("names", sa.Integer, nullable=False),
    )
