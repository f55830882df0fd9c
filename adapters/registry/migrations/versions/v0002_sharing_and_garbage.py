"""Tags, use times, shares, keys; versions of deleted names become garbage."""

import time

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_Name = sa.String(128).with_variant(sa.String(128, collation="C"), "postgresql")

_DEAD = """
    SELECT 1 FROM adapters WHERE adapters.id = versions.adapter_id
    AND (adapters.deleted_at IS NOT NULL OR versions.version < adapters.live_from)
"""


def upgrade() -> None:
    """Change schema 1 in place."""
    op.add_column("adapters", sa.Column("tags", sa.JSON, nullable=False, server_default="{}"))
    op.add_column("adapters", sa.Column("used", sa.Double, nullable=True))
    op.create_table(
        "shares",
        sa.Column("owner", _Name, primary_key=True),
        sa.Column("name", _Name, primary_key=True),
        sa.Column("grantee", _Name, primary_key=True),
    )
    op.create_index("shares_by_grantee", "shares", ["grantee", "owner", "name"])
    op.create_table(
        "garbage",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("since", sa.Double, nullable=False),
    )
    op.create_index("ix_garbage_since", "garbage", ["since"])
    op.create_table(
        "keys",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("secret_sha256", sa.String(64), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("owner", sa.String(128), nullable=False),
        sa.Column("label", sa.String(128), nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("revoked", sa.Double, nullable=True),
        sa.Column("limits", sa.JSON, nullable=False),
    )
    op.drop_index("versions_digest", "versions")
    op.create_index("versions_by_digest", "versions", ["digest", "adapter_id"])
    # When they died is not known of all of them: the grace period starts now.
    collect = sa.text(
        "INSERT INTO garbage (digest, since) "
        f"SELECT DISTINCT digest, :now FROM versions WHERE EXISTS ({_DEAD})"
    )
    now = sa.bindparam("now", time.time(), sa.Double)
    op.get_bind().execute(collect.bindparams(now))
    op.execute(f"DELETE FROM versions WHERE EXISTS ({_DEAD})")
