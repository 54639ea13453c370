"""
Looks the installed packages up in the advisory database: exit code 1 if one has a known vulnerability.

    .venv/bin/python .ci/audit.py

The database is a service on the network. Where it cannot be reached nothing is known, which is said, and is no failure
unless AUDIT=required: so a machine without network can work, and one with it cannot overlook anything.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


# Advisories that do not concern this project, each with the reason and until when it holds.
IGNORED: dict[str, str] = {}

SERVICES = ("pypi", "osv")


def installed() -> list[str]:
    """Everything but this project, as requirements. A build's own suffix (`+cpu`) is in no database."""
    found = {
        distribution.metadata["Name"].lower().replace("_", "-"): distribution.version.split("+")[0]
        for distribution in importlib.metadata.distributions()
    }
    return sorted(f"{name}=={version}" for name, version in found.items() if name != "trl-gspo")


def ask(requirements: list[str], service: str) -> list[dict] | str:
    """What pip-audit reports of each package, or, where it reports nothing, why."""
    with tempfile.TemporaryDirectory() as folder:
        listed, report = Path(folder, "requirements.txt"), Path(folder, "report.json")
        listed.write_text("\n".join(requirements) + "\n")
        command = [sys.executable, "-m", "pip_audit", "--requirement", listed, "--no-deps", "--disable-pip"]
        command += [
            "--format",
            "json",
            "--output",
            report,
            "--vulnerability-service",
            service,
            "--progress-spinner",
            "off",
        ]
        run = subprocess.run(command, capture_output=True, text=True)
        if report.is_file():
            return json.loads(report.read_text())["dependencies"]
        return (run.stderr.strip() or f"exit code {run.returncode}").splitlines()[-1]


def audit(
    requirements: list[str], ask: Callable[[list[str], str], list[dict] | str] = ask
) -> tuple[list[str], list[str]]:
    """
    Vulnerabilities, one line each, and what could not be looked up.

    The first service is asked for all packages, each other one for those that the ones before did not know.
    """
    found, unknown = [], list(requirements)
    for service in SERVICES:
        answer = ask(unknown, service) if unknown else []
        if isinstance(answer, str):
            print(f"{service} did not answer: {answer}", file=sys.stderr)
            continue
        known = {entry["name"].lower().replace("_", "-") for entry in answer if "skip_reason" not in entry}
        unknown = [line for line in unknown if line.split("==")[0] not in known]
        for entry in answer:
            for advisory in entry.get("vulns", []):
                names = {advisory["id"], *advisory.get("aliases", [])}
                if not names & set(IGNORED):
                    mended = ", ".join(advisory["fix_versions"]) or "none yet"
                    found.append(f"{entry['name']} {entry['version']}: {advisory['id']}, mended in: {mended}")
    return found, unknown


def main() -> int:
    requirements = installed()
    found, unknown = audit(requirements)
    for line in found:
        print(line)
    print(f"{len(requirements) - len(unknown)} of {len(requirements)} packages looked up, {len(found)} advisories.")
    if unknown:
        named = ", ".join(unknown[:5]) + (" and others" if len(unknown) > 5 else "")
        print(f"NOT AUDITED, because no advisory service knew or answered: {named}.")
    is_required = os.environ.get("AUDIT") == "required"
    return int(bool(found) or (is_required and bool(unknown)))


if __name__ == "__main__":
    sys.exit(main())
