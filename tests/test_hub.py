"""Models on the Hub, which a small server stands in for: what is downloaded, and what is refused."""

import json
import os
import subprocess
import sys

import checkpoints
import tiny_hub

from ponder_hf import PonderingForCausalLM


pytest_plugins = ["refusals"]

SEVERAL = """
import contextlib, io, json, sys
from ponder_hf.cli import main

results = []
for line in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(line)
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


def test_a_model_on_the_hub(made_once, tmp_path):
    base = tmp_path / "repository"
    checkpoints.save_base(base, "llama", shard_size="30KB", tokenizer=True)
    shards = {path.name for path in base.glob("*.safetensors")}
    assert len(shards) > 1
    for name in ("pytorch_model.bin", "modeling_special.py", "README.md", "model.fp16.safetensors"):
        (base / name).write_text("not to be downloaded")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((base / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_text("pickled")
    lines = [
        ["convert", "somebody/model", "out", "--json"],
        ["convert", "somebody/model", "again", "--revision", tiny_hub.COMMIT, "--json"],
        ["convert", "somebody/model", "no", "--revision", "nothing"],
        ["convert", "somebody/gated", "no"],
        ["convert", "nobody/model", "no"],
        ["convert", "somebody/pickled", "no"],
    ]
    with tiny_hub.serving({"somebody/model": base, "somebody/pickled": pickled}) as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        result = subprocess.run(
            [sys.executable, "-c", SEVERAL, json.dumps(lines)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
    ended = json.loads(result.stdout.splitlines()[-1])
    assert [code for code, _, _ in ended] == [0, 0, 2, 2, 2, 2], ended
    assert json.loads(ended[0][1])["revision"] == tiny_hub.COMMIT
    wanted = {path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()}
    wanted -= {"pytorch_model.bin", "modeling_special.py", "README.md", "model.fp16.safetensors"}
    assert sorted(hub.served) == sorted([*wanted, "config.json"]), "each file once, and none that is not needed"
    for folder in ("out", "again"):
        PonderingForCausalLM.from_pretrained(tmp_path / folder)
    refusals = ["no such revision", "is gated", "no such model on the Hub", "no weights"]
    for words, (_, out, err) in zip(refusals, ended[2:], strict=True):
        assert out == ""
        assert len(err.splitlines()) == 1
        assert words in err
    assert not (tmp_path / "no").exists()
