"""Schema migrations of the registry's database, run by Alembic when a registry is opened."""
