"""Alembic's entry: the connection is handed over by `database.open_database`."""

from alembic import context

from temper.registry.tables import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
with context.begin_transaction():
    context.run_migrations()
