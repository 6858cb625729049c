"""The first schema: releases, manifests, parents, documents, signatures, alias events; all append-only."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
TABLES = ("releases", "release_manifests", "release_parents", "documents", "signatures", "alias_events")


def upgrade() -> None:
    """Create the tables, and triggers that refuse to change or delete a row."""
    text, string = sa.Text(), sa.String()
    op.create_table(
        "releases", sa.Column("id", string, primary_key=True), sa.Column("model_id", string, nullable=False, index=True),
        sa.Column("artifact_hash", string, nullable=False, index=True), sa.Column("created", string, nullable=False),
        sa.Column("content", text, nullable=False),
    )  # fmt: skip
    op.create_table(
        "release_manifests", sa.Column("release_id", string, sa.ForeignKey("releases.id"), primary_key=True),
        sa.Column("role", string, primary_key=True), sa.Column("name", string, primary_key=True),
        sa.Column("manifest", string, nullable=False, index=True),
    )  # fmt: skip
    op.create_table(
        "release_parents", sa.Column("release_id", string, sa.ForeignKey("releases.id"), primary_key=True),
        sa.Column("parent", string, primary_key=True, index=True),
    )  # fmt: skip
    op.create_table(
        "documents",
        sa.Column("hash", string, primary_key=True),
        sa.Column("kind", string, nullable=False),
        sa.Column("content", text, nullable=False),
    )
    op.create_table(
        "signatures", sa.Column("release_id", string, sa.ForeignKey("releases.id"), primary_key=True),
        sa.Column("key_id", string, primary_key=True), sa.Column("envelope", text, nullable=False),
        sa.Column("signed", string, nullable=False),
    )  # fmt: skip
    op.create_table(
        "alias_events", sa.Column("id", sa.Integer(), primary_key=True, autoincrement=True), sa.Column("alias", string, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False), sa.Column("release_id", string, sa.ForeignKey("releases.id"), nullable=False),
        sa.Column("action", string, nullable=False), sa.Column("who", string, nullable=False), sa.Column("why", text, nullable=False),
        sa.Column("moved", string, nullable=False), sa.Column("chain", string, nullable=False), sa.UniqueConstraint("alias", "number"),
    )  # fmt: skip
    op.create_index("ix_alias_events_when", "alias_events", ["alias", "moved"])
    make_append_only(op.get_bind().dialect.name)


def make_append_only(dialect: str) -> None:
    """Triggers that abort UPDATE and DELETE on every table."""
    if dialect == "sqlite":
        for table in TABLES:
            for verb in ("UPDATE", "DELETE"):
                op.execute(
                    f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                    f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
                )
        return
    op.execute(
        "CREATE FUNCTION temper_append_only() RETURNS trigger AS $$ "
        "BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME; END $$ LANGUAGE plpgsql"
    )
    for table in TABLES:
        op.execute(
            f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION temper_append_only()"
        )


def downgrade() -> None:
    """Drop everything: there is no earlier schema."""
    for table in reversed(TABLES):
        op.drop_table(table)
