"""The notebooks of examples/notebooks run as they stand, from top to bottom, in a kernel of their own."""

import json
import os
import sys
from pathlib import Path

import pytest
from patience import PATIENCE


NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "examples/notebooks").glob("*.ipynb"))


def code(notebook):
    return "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_output_and_asks_for_no_device(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert [cell for cell in notebook["cells"] if cell.get("outputs") or cell.get("execution_count")] == []
    source = code(notebook)
    assert ".cuda()" not in source
    assert 'find_spec("ponder_hf")' in source


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs ponder-hf[test]")
    nbclient = pytest.importorskip("nbclient", reason="needs ponder-hf[test]")
    # The kernel is this very interpreter, wherever the machine's own kernels are.
    kernel = tmp_path / "jupyter/kernels/python3"
    kernel.mkdir(parents=True)
    arguments = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    description = {"argv": arguments, "display_name": "Python 3", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(description))
    monkeypatch.setenv("JUPYTER_PATH", os.fspath(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", os.fspath(tmp_path / "ipython"))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=PATIENCE, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any(output.get("name") == "stdout" for output in outputs)
    assert [output.text for output in outputs if output.get("name") == "stderr" and "Error" in output.text] == []


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["convert_and_continue", "faster_generation", "look_inside"]
