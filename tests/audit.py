"""`python tests/audit.py PIP_AUDIT`: known vulnerabilities of what is installed beside this interpreter.

Asks PyPI, then OSV. Exit code 0: every package was checked and nothing is known. 1: something is known, or
some packages could not be checked. 2: no service answered, so nothing was checked.
"""

import json
import subprocess
import sys
import sysconfig

OURS = "lightning-n2uq"
SERVICES = ("pypi", "osv")


def audit(tool, service):
    """Packages as pip-audit lists them, or the last line of why there is no list."""
    command = [
        tool,
        "--path",
        sysconfig.get_path("purelib"),
        "--format",
        "json",
        "--vulnerability-service",
        service,
    ]
    try:
        done = subprocess.run(
            [*command, "--progress-spinner", "off", "--timeout", "15"],
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        return json.loads(done.stdout)["dependencies"]
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    except ValueError:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit code {done.returncode}"


def verdict(packages):
    """Exit code and lines for a list of packages; the code is 2 where none was checked."""
    packages = [package for package in packages if package["name"].replace("_", "-") != OURS]
    checked = [package for package in packages if "skip_reason" not in package]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if not checked:
        reason = next((p["skip_reason"] for p in packages if "skip_reason" in p), "no packages")
        return 2, [f"the service knows none of {len(packages)} packages ({reason})"]
    known = [f"{p['name']} {p['version']}: {v['id']}" for p in checked for v in p.get("vulns", ())]
    lines = [
        f"{len(checked)} of {len(packages)} packages checked, {len(known)} known vulnerabilities",
        *known,
    ]
    if skipped:
        lines.append(f"not checked: {', '.join(skipped)}")
    return int(bool(known or skipped)), lines


def main(tool):
    for service in SERVICES:
        found = audit(tool, service)
        code, lines = (2, [f"no answer ({found})"]) if isinstance(found, str) else verdict(found)
        print("\n".join(f"audit: {service}: {line}" for line in lines))
        if code != 2:
            return code
    print("audit: no vulnerability service can be reached from here: nothing was checked")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
