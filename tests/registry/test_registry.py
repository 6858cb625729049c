"""Releases: content ids, refused promotions, append-only history, rollback, deprecation, lineage, signatures."""

import datetime as dt
import json
import os
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from temper.core.errors import IntegrityError, MissingDependency, ReleaseError
from temper.core.records import Manifest
from temper.core.reports import Finding, Report, Verdict
from temper.core.storage import whole_folder
from temper.registry import AccessPolicy, DeprecationPlan, Registry, artifact_hash, artifact_hash_of, new_key
from temper.registry import aliases as alias_module
from temper.registry.release import UNIT_FIELDS
from temper.registry.signing import verify


def folder(path, **files):
    with whole_folder(path) as scratch:
        for name, text in files.items():
            (scratch / name).write_text(text)
    return path


def promoting(artifact, decision="promote", role="candidate"):
    status = "pass" if decision == "promote" else "fail"
    finding = Finding(rule="tools.precision", status=status, observed="0.95", required=">= 0.90", reason="low end 0.93")
    return Verdict(decision=decision, findings=(finding,), evidence={role: artifact, "baseline": "b" * 64})


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry")


@pytest.fixture
def make(registry, tmp_path):
    """Register a release whose weights are `text`; its verdict promotes unless told otherwise."""

    def build(text, verdict="promote", tenants=(), **fields):
        weights = folder(tmp_path / f"w-{text}", weights=text, **{"tokenizer.json": "vocabulary"})
        adapters = {tenant: folder(tmp_path / f"a-{text}-{tenant}", adapter=f"{text} {tenant}") for tenant in tenants}
        hashes = {tenant: registry.store.add(path) for tenant, path in adapters.items()}
        artifact = artifact_hash(registry.store.add(weights), hashes)
        fields["verdict"] = promoting(artifact, verdict) if isinstance(verdict, str) else verdict
        return registry.register(model_id="finops", weights=weights, adapters=adapters, base_model_id="finops-base", **fields)

    return build


def test_equal_content_is_one_release_and_any_difference_another(registry, make):
    first, again = make("one"), make("one")
    assert first.id == again.id
    assert first.created == again.created
    assert len(registry.list()) == 1
    assert make("one", deprecation_plan=DeprecationPlan(end=dt.date(2030, 1, 1))).id != first.id


def test_a_release_survives_the_loss_and_the_editing_of_its_run_folder(registry, make, tmp_path):
    release = make("one")
    (tmp_path / "w-one" / "weights").write_text("edited in place")
    assert (registry.weights_path(registry.resolve(release.id)) / "weights").read_text() == "one"


def test_promote_refuses_each_way_a_verdict_can_fall_short(make, registry):
    with pytest.raises(ReleaseError, match="has no verdict"):
        registry.promote(make("none", verdict=None).id, reason="try")
    with pytest.raises(ReleaseError, match=r"'hold'.*\n.*tools.precision"):
        registry.promote(make("held", verdict="hold").id, reason="try")
    with pytest.raises(ReleaseError, match="'cannot_tell'"):
        registry.promote(make("unsure", verdict="cannot_tell").id, reason="try")
    with pytest.raises(ReleaseError, match="judged another artefact"):
        registry.promote(make("borrowed", verdict=promoting("c" * 64)).id, reason="try")
    assert registry.history() == []


def test_a_verdict_on_the_baseline_does_not_promote_it(make, registry):
    plain = make("plain", verdict=None)
    only_baseline = promoting(plain.artifact_hash, role="baseline")
    again = make("plain", verdict=only_baseline)
    with pytest.raises(ReleaseError, match="judged another artefact"):
        registry.promote(again.id, reason="try")


def test_swapping_one_tenants_adapter_voids_the_verdict(registry, make, tmp_path):
    judged = make("one", tenants=("bank_a", "retail_b"))
    swapped = registry.register(
        model_id="finops", weights=tmp_path / "w-one", base_model_id="finops-base", verdict=judged.verdict,
        adapters={"bank_a": tmp_path / "a-one-retail_b", "retail_b": tmp_path / "a-one-bank_a"},
    )  # fmt: skip
    with pytest.raises(ReleaseError, match="judged another artefact"):
        registry.promote(swapped.id, reason="try")
    assert registry.promote(judged.id, reason="judged").release_id == judged.id


def test_register_refuses_a_report_of_other_weights_and_torn_folders(registry, tmp_path):
    weights = folder(tmp_path / "w", weights="x")
    report = Report(name="sft", model="finops", model_hash="d" * 64, split="dev", suite_hash="s", dimensions={})
    with pytest.raises(ReleaseError, match="did not judge"):
        registry.register(model_id="m", weights=weights, base_model_id="b", report=report)
    (weights / "weights").write_text("changed")
    with pytest.raises(IntegrityError, match="differs from its manifest") as caught:
        registry.register(model_id="m", weights=weights, base_model_id="b")
    assert caught.value.exit_code == 2
    assert registry.list() == []


def test_bytes_changed_in_the_store_stop_promote_resolve_and_rollback(registry, make):
    one, two = make("one", tenants=("bank_a",)), make("two")
    registry.promote(one.id, reason="first")
    registry.promote(two.id, reason="second")
    changed = registry.adapter_path(one, "bank_a") / "adapter"
    changed.chmod(0o644)
    changed.write_text("poisoned")
    for act in (
        lambda: registry.resolve(one.id),
        lambda: registry.promote(one.id, reason="again"),
        lambda: registry.rollback(reason="back"),
    ):
        with pytest.raises(IntegrityError, match="adapter differs from its manifest"):
            act()
    assert registry.current("production") == two.id
    make("one", tenants=("bank_a",))  # registering again from the run folder mends the store
    assert registry.resolve(one.id).id == one.id


def test_history_says_who_why_when_and_refuses_edits_even_in_sql(registry, make, tmp_path):
    release = make("one")
    registry.promote(release.id, reason="quarterly release", who="dana")
    (event,) = registry.history()
    assert (event.action, event.who, event.why, event.number) == ("promote", "dana", "quarterly release", 1)
    database = sa.create_engine(f"sqlite:///{tmp_path}/registry/registry.sqlite")
    for statement in ("UPDATE alias_events SET who='eve'", "DELETE FROM alias_events", "UPDATE releases SET content='{}'"):
        with database.begin() as connection, pytest.raises(sa.exc.IntegrityError, match="append-only"):
            connection.execute(sa.text(statement))
    with database.begin() as connection:  # someone who drops the trigger is still found out by the chain
        connection.execute(sa.text("DROP TRIGGER alias_events_no_update"))
        connection.execute(sa.text("UPDATE alias_events SET who='eve'"))
    with pytest.raises(IntegrityError, match="altered at move 1"):
        registry.history()


def test_a_release_edited_in_sql_is_found_out(registry, make, tmp_path):
    release = make("one", verdict="hold")
    database = sa.create_engine(f"sqlite:///{tmp_path}/registry/registry.sqlite")
    with database.begin() as connection:
        connection.execute(sa.text("DROP TRIGGER releases_no_update"))
        connection.execute(sa.text("""UPDATE releases SET content = replace(content, '"hold"', '"promote"')"""))
    with pytest.raises(IntegrityError, match="altered in the database"):
        registry.promote(release.id, reason="try")


def test_rollback_walks_back_through_distinct_releases_and_never_forward(registry, make):
    one, two, three = make("one"), make("two"), make("three")
    with pytest.raises(ReleaseError, match="nothing to roll back to"):
        registry.rollback(reason="x")
    for release in (one, two, two, three):
        registry.promote(release.id, reason="go")
    assert registry.rollback(reason="three fails").release_id == two.id
    assert registry.rollback(reason="two fails too").release_id == one.id
    with pytest.raises(ReleaseError, match="nothing to roll back to"):
        registry.rollback(reason="no more")
    registry.promote(three.id, reason="mended")
    assert registry.rollback(reason="not mended").release_id == one.id
    assert [event.action for event in registry.history()] == ["promote"] * 4 + ["rollback"] * 2 + ["promote", "rollback"]


def test_which_release_was_production_on_a_date(registry, make, monkeypatch):
    one, two = make("one"), make("two")
    real = alias_module.stamp
    clock = {"now": "2026-03-01T12:00:00.000000Z"}
    monkeypatch.setattr(alias_module, "stamp", lambda when=None: real(when) if when else clock["now"])
    registry.promote(one.id, reason="march")
    clock["now"] = "2026-05-02T09:30:00.000000Z"
    registry.promote(two.id, reason="may")
    assert registry.at("production", "2026-02-28") is None
    assert registry.at("production", "2026-03-01").id == one.id
    assert registry.at("production", "2026-05-02T09:29:59Z").id == one.id
    assert registry.at("production", "2026-05-02T11:30:00+02:00").id == two.id  # 09:30 UTC
    assert registry.at("production", dt.date(2026, 5, 2)).id == two.id
    with pytest.raises(ReleaseError, match="no time zone"):
        registry.at("production", dt.datetime(2026, 5, 2))
    clock["now"] = "2026-01-01T00:00:00.000000Z"  # the clock was set back: order and time still agree
    registry.promote(one.id, reason="clock set back")
    assert registry.history()[-1].moved == "2026-05-02T09:30:00.000000Z"


def test_past_its_last_day_a_release_is_refused_unless_overridden(registry, make):
    plan = DeprecationPlan(end=dt.date(2026, 6, 30), successor="f" * 64, notice="replaced by the autumn model")
    release = make("old", deprecation_plan=plan)
    assert registry.resolve(release.id, today=dt.date(2026, 6, 30)).id == release.id
    with pytest.raises(ReleaseError, match=r"ended on 2026-06-30\n.*autumn model\n.*successor ffff"):
        registry.resolve(release.id, today=dt.date(2026, 7, 1))
    assert registry.resolve(release.id, today=dt.date(2026, 7, 1), override=True).id == release.id


def test_the_statement_holds_all_nine_fields_and_its_signature_binds_them(registry, make, tmp_path):
    key, other = new_key(tmp_path / "keys/release"), new_key(tmp_path / "keys/other")
    assert (tmp_path / "keys/release").stat().st_mode & 0o777 == 0o600
    release = make("one", key=key, training_data_manifest={"sft": "a" * 64}, reward_manifest="e" * 64)
    statement = release.statement()
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"] == [{"name": "finops", "digest": {"sha256": release.artifact_hash}}]
    assert all(field in statement["predicate"] for field in UNIT_FIELDS)
    assert len(UNIT_FIELDS) == 9
    (envelope,) = registry.envelopes(release.id)
    assert verify(envelope, key.public_key()) == json.loads(json.dumps(statement))
    with pytest.raises(IntegrityError, match="not signed by this key"):
        verify(envelope, other.public_key())
    forged = {**envelope, "signatures": [{**envelope["signatures"][0], "sig": "AAAA"}]}
    with pytest.raises(IntegrityError, match="does not fit"):
        verify(forged, key.public_key())
    trusting = Registry(registry.path, trusted=[key.public_key()])
    assert trusting.resolve(release.id).id == release.id
    with pytest.raises(IntegrityError, match="no valid signature"):
        trusting.promote(make("unsigned").id, reason="try")
    with pytest.raises(IntegrityError, match="no valid signature"):
        Registry(registry.path, trusted=[other.public_key()]).promote(release.id, reason="try")


def test_rollback_is_exercised_on_a_scratch_alias(registry, make):
    one, two = make("one"), make("two")
    assert registry.rollback_check(one.id).status == "unknown"
    registry.promote(one.id, reason="first")
    finding = registry.rollback_check(two.id)
    assert finding.status == "pass", finding
    assert registry.current("production") == one.id
    held = make("held", verdict="hold")
    assert registry.rollback_check(held.id).status == "fail"


def test_lineage_and_revocation_reach_descendants(registry, make):
    manifest = Manifest(
        name="sft", records_file="sft.jsonl", records_sha256="0" * 64, admitted=("r1", "r2"), rules={}, heldout={}, refusals=(), counts={}
    )
    parent = make("parent", training_data_manifest={"sft": manifest.hash}, documents=[manifest])
    child = make("child", parents=[parent.id, "e" * 64], training_data_manifest={"dpo": "d" * 64})
    clean = make("clean", training_data_manifest={"sft": "c" * 64})
    tree = registry.lineage(child.id)
    assert [node["id"] for node in tree["parents"]] == [parent.id, "e" * 64]
    assert tree["parents"][1]["registered"] is False
    assert tree["parents"][0]["manifests"] == [{"role": "training_data", "name": "sft", "hash": manifest.hash, "kept": True}]
    assert {item.id for item in registry.releases_using_manifest(manifest.hash)} == {parent.id, child.id}
    assert {item.id for item in registry.releases_using_record("r2")} == {parent.id, child.id}
    assert registry.releases_using_record("r3") == []
    assert clean.id not in {item.id for item in registry.releases_using_manifest(manifest.hash)}


def test_references_and_bad_names(registry, make):
    release = make("one")
    registry.promote(release.id, "staging", reason="look")
    assert registry.show(release.id[:10]).id == registry.show("staging").id == release.id
    assert registry.aliases() == {"staging": release.id}
    with pytest.raises(ReleaseError, match=r"no release or alias 'production'.*\n.*staging"):
        registry.resolve("production")
    with pytest.raises(ReleaseError, match="no name for an alias"):
        registry.promote(release.id, "deadbeef", reason="x")
    with pytest.raises(ReleaseError, match="needs a reason"):
        registry.promote(release.id, reason=" ")
    with pytest.raises(ValueError, match="SHA-256"):
        AccessPolicy(api_keys={"sk-plain": "bank_a"})


def test_opening_is_fast_and_the_migration_makes_exactly_the_declared_tables(registry):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    from temper.registry import database
    from temper.registry.tables import APPEND_ONLY, Base

    with registry._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
        triggers = {row[0] for row in connection.execute(sa.text("SELECT name FROM sqlite_master WHERE type='trigger'"))}
    assert triggers == {f"{table}_no_{verb}" for table in APPEND_ONLY for verb in ("update", "delete")}
    assert ScriptDirectory(str(Path(database.__file__).parent / "migrations")).get_current_head() == database.HEAD
    started = time.monotonic()
    Registry(registry.path)
    assert time.monotonic() - started < 0.5


def test_the_artefact_hash_of_run_folders_is_what_the_release_will_carry(make, tmp_path):
    release = make("one", tenants=("retail_b", "bank_a"))
    adapters = {tenant: tmp_path / f"a-one-{tenant}" for tenant in ("retail_b", "bank_a")}
    assert artifact_hash_of(tmp_path / "w-one", adapters) == release.artifact_hash
    assert artifact_hash_of(tmp_path / "w-one") == release.weights


def test_a_database_that_cannot_be_had_is_said_clearly(tmp_path):
    (tmp_path / "registry.sqlite").write_text("this is no database, whatever its name says")
    with pytest.raises(ReleaseError, match=r"cannot be read\n.*not a database"):
        Registry(tmp_path)
    with pytest.raises(MissingDependency, match=r"no driver for postgresql\+pg8000"):
        Registry(tmp_path / "team", url="postgresql+pg8000://nobody@127.0.0.1:1/none")


def test_the_same_on_postgresql(make, registry, tmp_path):
    """Runs where psycopg is installed and TEMPER_TEST_POSTGRES is the URL of an empty database."""
    pytest.importorskip("psycopg")
    if "TEMPER_TEST_POSTGRES" not in os.environ:
        pytest.skip("TEMPER_TEST_POSTGRES names no PostgreSQL database")
    team = Registry(tmp_path / "team", url=os.environ["TEMPER_TEST_POSTGRES"])
    for text in ("one", "two"):
        verdict = make(text).verdict
        release = team.register(model_id="finops", base_model_id="finops-base", weights=tmp_path / f"w-{text}", verdict=verdict)
        team.promote(release.id, reason="test")
    first, second = [event.release_id for event in team.history()][-2:]
    assert team.rollback(reason="test").release_id == first
    assert team.current("production") != second
    with team._engine.begin() as connection, pytest.raises(sa.exc.DBAPIError, match="append-only"):
        connection.execute(sa.text("UPDATE alias_events SET who='eve'"))
