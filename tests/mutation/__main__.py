"""Break the code in many small ways, one at a time, and see that the tests notice each.

    python -m mutation [PART ...]

The repository is copied; nothing is changed in it. Without mutants the tests must pass; with each of them a test must
fail. Ends with 1 where one survives.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from mutation.mutants import MUTANTS, Mutant


ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED = 0, 1  # what pytest ends with
RUN_TESTS = "run_tests.py"  # in place of `python -m pytest`, which would find ponder_hf/ without modeling/ in it
SECONDS = 1800  # a mutant that hangs is noticed, too


def copy_of_repository(folder: Path) -> Path:
    """A copy in which tests import the copy: as it lies once it is installed, in front of everything else."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    package = folder / "installed" / "ponder_hf"
    package.mkdir(parents=True)
    for path in (*(folder / "ponder_hf").iterdir(), folder / "modeling", folder / "conversion"):
        (package / path.name).symlink_to(path)
    (folder / "installed" / RUN_TESTS).write_text("import sys, pytest\nsys.exit(pytest.main(sys.argv[1:]))\n")
    if (ROOT.parent / "shared").exists():
        (folder.parent / "shared").symlink_to(ROOT.parent / "shared")
    return folder


def run_tests(folder: Path, tests: tuple[str, ...], python: str) -> subprocess.CompletedProcess:
    """Run test files of a copy, up to the first failure; in the environment of vLLM without the slow ones."""
    path = os.pathsep.join([str(folder / "installed"), str(folder / "tests")])
    names = [f"tests/{name}" for name in tests]
    chosen = [] if python == sys.executable else ["-m", "not slow"]  # half an hour for each mutant that survives
    return subprocess.run(
        [python, f"installed/{RUN_TESTS}", "-q", "-x", "-p", "no:cacheprovider", *chosen, *names],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def is_noticed(mutant: Mutant, folder: Path, python: str) -> bool:
    """Whether a test fails where this mutant is; the copy is as before afterwards.

    Raises:
        RuntimeError: pytest ended in another way than by passing or failing.
    """
    path = folder / mutant.file
    original = path.read_text(encoding="utf-8")
    try:
        path.write_text(original.replace(mutant.before, mutant.after), encoding="utf-8")
        result = run_tests(folder, mutant.tests, python)
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(original, encoding="utf-8")
    if result.returncode not in (PASSED, FAILED) and "Error" not in result.stdout + result.stderr:
        raise RuntimeError(f"{mutant.name}: pytest ended with {result.returncode}\n{result.stdout}{result.stderr}")
    return result.returncode != PASSED


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="only mutants with one of these in their names")
    parser.add_argument("--workers", type=int, default=2, help="copies of the repository that are tested at once")
    parser.add_argument(
        "--vllm", metavar="PYTHON", help="of the environment of `make vllm`; without it those are left out"
    )
    parser.add_argument("--list", action="store_true", help="name the mutants and do nothing")
    arguments = parser.parse_args(argv)
    chosen = [
        mutant
        for mutant in MUTANTS
        if (not arguments.parts or any(part in mutant.name for part in arguments.parts))
        and (arguments.vllm or not mutant.in_vllm)
    ]
    if arguments.list:
        print(*(mutant.name for mutant in chosen), sep="\n")
        return 0
    python_of = {True: arguments.vllm, False: sys.executable}
    survivors = []
    with tempfile.TemporaryDirectory() as place:
        copies: Queue[Path] = Queue()
        for number in range(arguments.workers):
            copies.put(copy_of_repository(Path(place) / str(number) / "copy"))

        def in_a_copy(task):
            folder = copies.get()
            try:
                return task(folder)
            finally:
                copies.put(folder)

        with ThreadPoolExecutor(arguments.workers) as pool:
            suites = list(dict.fromkeys((mutant.tests, mutant.in_vllm) for mutant in chosen))
            results = pool.map(
                lambda suite: in_a_copy(lambda folder: run_tests(folder, suite[0], python_of[suite[1]])), suites
            )
            for (tests, _), result in zip(suites, results, strict=True):
                if result.returncode != PASSED:
                    print(
                        f"{' '.join(tests)} fail without any mutant:\n{result.stdout}{result.stderr}", file=sys.stderr
                    )
                    return 1
                print(f"passes as it is: {' '.join(tests)}", flush=True)

            def try_one(mutant):
                start = time.monotonic()
                found = in_a_copy(lambda folder: is_noticed(mutant, folder, python_of[mutant.in_vllm]))
                return found, time.monotonic() - start

            for number, (mutant, (found, seconds)) in enumerate(
                zip(chosen, pool.map(try_one, chosen), strict=True), start=1
            ):
                if not found:
                    survivors.append(mutant)
                state = "noticed " if found else "SURVIVED"
                print(f"[{number}/{len(chosen)}] {state} {seconds:4.0f} s  {mutant.name}", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
