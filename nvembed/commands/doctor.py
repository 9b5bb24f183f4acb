"""`nvembed doctor`: check this machine."""

from __future__ import annotations

from nvembed.commands.common import AsJson, ended, show
from nvembed.pipeline.exit_codes import ExitCode


def doctor_command(as_json: AsJson = False) -> None:
    """Check this machine: versions, packages, processor, memory, Ray. Exit code 0, or 3 when something is wrong."""

    def action() -> int:
        from nvembed.preflight import doctor
        from nvembed.preflight.findings import PROBLEM, as_text
        from nvembed.preflight.findings import as_json as plain

        findings = doctor.examine()
        show(plain(findings), as_text(findings), as_json)
        return ExitCode.PREFLIGHT if any(finding.state == PROBLEM for finding in findings) else ExitCode.DONE

    raise ended(action)
