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
    # Names have been counted before. Versions lead, in the order in which they and the adapters
    # lie on disk: SQLite would begin with the owners' index and jump about for a million adapters.
    op.execute(
        """
        INSERT INTO owners (owner, names, bytes)
        SELECT
            sizes.owner,
            (SELECT SUM(totals.names) FROM totals WHERE totals.owner = sizes.owner),
            sizes.bytes
        FROM (
            SELECT adapters.owner AS owner, SUM(versions.bytes) AS bytes
            FROM versions CROSS JOIN adapters
            WHERE adapters.id = versions.adapter_id AND adapters.deleted_at IS NULL
            GROUP BY adapters.owner
        ) AS sizes
        """
    )
