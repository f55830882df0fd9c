"""Run by Alembic for every command; ``upgrading.py`` gives it the connection to work on."""

from alembic import context

from shoal.adapters.registry.tables import METADATA

# The connection is inside a transaction already: nothing is committed here.
context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
)
context.run_migrations()
