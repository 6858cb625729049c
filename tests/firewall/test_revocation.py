"""Revocation: a withdrawn record taints what admitted it, and what was made from it."""

from __future__ import annotations

from pathlib import Path

from temper.core.records import Message, Provenance, Record
from temper.firewall.admission import admit, write_manifest
from temper.firewall.privacy import redact
from temper.firewall.revocation import revoke, revoke_in_folders

PROVENANCE = Provenance(source="test", licence="MIT", split="train", privacy="public", access="public", synthetic=False)


def chat(answer: str, *parents: str) -> Record:
    messages = (Message(role="user", content=f"about {answer}"), Message(role="assistant", content=answer))
    return Record(messages=messages, provenance=PROVENANCE.model_copy(update={"parents": parents}))


def test_descendants_are_tainted_and_the_others_are_not(tmp_path: Path) -> None:
    personal = chat("write to jane@acme.io")
    clean = redact(personal)
    rewritten, other = chat("rewritten", clean.id), chat("another")
    folders = {name: tmp_path / name for name in ("sft", "dpo", "rl")}
    sft = write_manifest(folders["sft"], admit([clean, other], name="sft"))
    dpo = write_manifest(folders["dpo"], admit([rewritten, other], name="dpo"))
    write_manifest(folders["rl"], admit([other], name="rl"))
    # `personal` itself was never admitted: it is found as the parent of `clean`, and so of `rewritten`.
    found = revoke_in_folders([personal.id], folders.values())
    assert found.tainted == {sft.hash: (clean.id,), dpo.hash: (rewritten.id,)}
    assert found.names == {sft.hash: "sft", dpo.hash: "dpo"}
    assert found.nowhere == ()


def test_an_id_that_stands_nowhere_is_said(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m", admit([chat("x")], name="m"))
    found = revoke(iter(["0" * 64, chat("x").id]), [manifest])
    assert found.nowhere == ("0" * 64,)
    assert found.tainted == {manifest.hash: (chat("x").id,)}
