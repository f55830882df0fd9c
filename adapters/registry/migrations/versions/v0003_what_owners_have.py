"""What each owner has: names and bytes of all bases, counted once and kept from here on."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Change schema 2 in place."""
    op.create_table(
        "owners",
        sa.Column("owner", sa.String(128), primary_key=True),
        sa.Column("names", sa.Integer, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
    )
    op.execute(
        "INSERT INTO owners (owner, names, bytes) "
        "SELECT adapters.owner, COUNT(DISTINCT adapters.id), SUM(versions.bytes) "
        "FROM adapters JOIN versions ON versions.adapter_id = adapters.id "
        "WHERE adapters.deleted_at IS NULL AND versions.version >= adapters.live_from "
        "GROUP BY adapters.owner"
    )
