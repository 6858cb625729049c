"""Opening the database: SQLite in the registry's folder, or PostgreSQL by URL; migrated on open."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from temper.core.errors import MissingDependency, ReleaseError
from temper.core.storage import disk_errors

HEAD = "0001"  # the newest revision in migrations/versions; a test compares the two
BUSY_MS = 30_000


def open_database(url: str, folder: Path) -> sa.Engine:
    """An engine on `url`, its schema at HEAD. Where it already is, Alembic is not even imported."""
    try:
        engine = sa.create_engine(url)
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"no driver for {url.partition('://')[0]}",
            why=str(error),
            do="install it, for example `pip install psycopg[binary]`, and use a postgresql+psycopg:// URL",
        ) from error
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _sqlite_settings)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        found = revision(engine)
    except sa.exc.DBAPIError as error:
        shown = engine.url.render_as_string(hide_password=True)
        raise ReleaseError(
            f"the registry's database {shown} cannot be read",
            why=str(error.orig).strip().splitlines()[0],
            do="check that it is a database of temper's, that its server runs, and that you may read it",
        ) from error
    if found != HEAD:
        with _only_one(folder / ".migrate.lock"):
            _upgrade(engine)
    return engine


def revision(engine: sa.Engine) -> str | None:
    """The schema revision that the database is at; None for an empty one."""
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        found: str | None = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
        return found


def _upgrade(engine: sa.Engine) -> None:
    from alembic import command
    from alembic.config import Config as AlembicConfig
    from alembic.util import CommandError

    config = AlembicConfig()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        if engine.dialect.name == "sqlite":  # its driver begins no transaction for DDL: without one, a kill leaves half a schema
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise ReleaseError(
                "the registry's schema cannot be brought up to date",
                why=str(error),
                do="open it with the temper version that wrote it, or a newer one",
            ) from error


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)


def _sqlite_settings(connection: Any, record: Any) -> None:
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute(f"PRAGMA busy_timeout={BUSY_MS}")
