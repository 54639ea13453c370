"""`.ci/audit.py`, with the answers of an advisory service, and with its silence."""

import importlib.util
from pathlib import Path

import pytest


specification = importlib.util.spec_from_file_location("audit", Path(__file__).parents[1] / ".ci" / "audit.py")
audit = importlib.util.module_from_spec(specification)
specification.loader.exec_module(audit)

ADVISORY = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.0"], "description": ""}
GOOD = {"name": "good", "version": "1.0", "vulns": []}
BAD = {"name": "bad", "version": "1.0", "vulns": [ADVISORY]}
SKIPPED = {"name": "bad", "skip_reason": "Dependency not found"}


@pytest.fixture
def answers(monkeypatch):
    given = {}
    monkeypatch.setattr(audit, "installed", lambda: ["bad==1.0", "good==1.0"])
    monkeypatch.setattr(audit.audit, "__defaults__", (lambda requirements, service: given[service],))
    return given


def test_a_vulnerable_package_fails(answers, capsys):
    answers |= {"pypi": [GOOD, BAD]}
    assert audit.main() == 1
    printed = capsys.readouterr().out
    assert "bad 1.0: PYSEC-1, mended in: 2.0" in printed and "2 of 2 packages looked up" in printed
    assert "NOT AUDITED" not in printed


@pytest.mark.parametrize("name", ["PYSEC-1", "CVE-1"])
def test_an_advisory_may_be_ignored_by_any_of_its_names(name, answers, monkeypatch):
    answers |= {"pypi": [GOOD, BAD]}
    monkeypatch.setitem(audit.IGNORED, name, "for this test")
    assert audit.main() == 0


def test_the_other_service_is_asked_for_what_the_first_does_not_know(answers, capsys):
    answers |= {"pypi": [GOOD, SKIPPED], "osv": [BAD]}
    assert audit.main() == 1
    assert "NOT AUDITED" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "silence",
    [
        {"pypi": "ConnectionError: name not resolved", "osv": "ConnectionError: name not resolved"},
        {"pypi": [SKIPPED, SKIPPED | {"name": "good"}], "osv": "ConnectionError: name not resolved"},
    ],
    ids=["no answer", "knows nothing"],
)
def test_silence_is_said_and_fails_only_where_an_audit_is_required(silence, answers, capsys, monkeypatch):
    answers |= silence
    assert audit.main() == 0
    printed = capsys.readouterr()
    assert "0 of 2 packages looked up" in printed.out and "NOT AUDITED" in printed.out
    assert "osv did not answer: ConnectionError" in printed.err
    monkeypatch.setenv("AUDIT", "required")
    assert audit.main() == 1


def test_what_is_installed_is_looked_up_under_its_public_version():
    listed = audit.installed()
    assert any(line.startswith("torch==") for line in listed) and not any("+" in line for line in listed)
    assert not any(line.startswith("trl-gspo") for line in listed)
