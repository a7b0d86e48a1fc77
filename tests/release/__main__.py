"""Build the source archive and the wheel, and try both in a fresh environment of each Python that is named,
one after the other:

    PYTHONPATH=tests .venv/bin/python -m release --output dist python3.10 python3.12

An environment has what the package asks for, by constraints.txt, and nothing else. Interpreters that are not here are
named and passed over. The exit code is 0 only if every archive worked everywhere.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ponder_hf import __version__


REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("installed.py")
# Each ends with exit code 0 in an environment that has nothing but the package and what it asks for.
COMMANDS = (["--version"], ["--help"], ["doctor"])


def run(command, folder):
    """Run a command in a folder outside the checkout. Returns what it printed.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables |= {"HF_HOME": str(folder / "huggingface"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    return done.stdout


def build(output):
    """Put both archives of this version into a folder. Returns their paths."""
    output.mkdir(parents=True, exist_ok=True)
    for old in output.glob("ponder_hf-*"):
        old.unlink()
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", output.resolve(), REPOSITORY], output)
    return sorted(output.glob("ponder_hf-*"))


def try_archives(archives, interpreter, place):
    """Install archives one after another into a fresh environment in a folder, and use each. Yields what came out."""
    run([interpreter, "-m", "venv", place / "venv"], place)
    python = place / "venv/bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "-c", REPOSITORY / "constraints.txt"]
    for number, archive in enumerate(archives):
        run([*install, *(["--force-reinstall", "--no-deps"] if number else []), archive.resolve()], place)
        run([python, "-m", "pip", "check"], place)
        for arguments in COMMANDS:
            run([place / "venv/bin/ponder-hf", *arguments], place)
        yield f"{archive.name}: {run([python, '-I', '-W', 'ignore', PROGRAM, __version__], place).splitlines()[-1]}"


def main():
    parser = argparse.ArgumentParser(
        prog="release", description="Build both archives and try each in fresh environments."
    )
    parser.add_argument("--output", type=Path, default=Path("dist"), help="the folder of the archives")
    parser.add_argument("interpreters", nargs="+", metavar="PYTHON", help="such as python3.12")
    args = parser.parse_args()
    archives = build(args.output)
    failed = False
    for interpreter in args.interpreters:
        if shutil.which(interpreter) is None:
            print(f"{interpreter}: not here", flush=True)
            continue
        with tempfile.TemporaryDirectory() as place:
            try:
                for line in try_archives(archives, interpreter, Path(place)):
                    print(line, flush=True)
            except subprocess.CalledProcessError as error:
                failed = True
                print(f"{interpreter}: FAILED: {' '.join(map(str, error.cmd))}\n{error.stdout}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
