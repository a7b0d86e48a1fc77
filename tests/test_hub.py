"""Models on the Hub, which a small server stands in for: what is downloaded, and what is refused."""

import checkpoints
import hub_client
import hub_server

from ponder_hf import PonderingForCausalLM


def test_a_model_on_the_hub(tmp_path):
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
    with hub_server.serving() as hub, hub_client.connected(hub, tmp_path) as client:
        commit = hub.add("somebody/model", base).references["main"]
        hub.add("somebody/pickled", pickled)
        hub.add("somebody/gated", pickled, gated=True)
        assert client.json("convert", "somebody/model", "out")["revision"] == commit
        client.json("convert", "somebody/model", "again", "--revision", commit)
        refusals = {
            ("somebody/model", "no", "--revision", "nothing"): "no such revision",
            ("somebody/gated", "no"): "is gated",
            ("nobody/model", "no"): "no such model on the Hub",
            ("somebody/pickled", "no"): "no weights",
        }
        for words, says in refusals.items():
            assert says in client.refused("convert", *words)
    wanted = {path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()}
    wanted -= {"pytorch_model.bin", "modeling_special.py", "README.md", "model.fp16.safetensors"}
    assert sorted(hub.served) == sorted([*wanted, "config.json"]), "each file once, and none that is not needed"
    for folder in ("out", "again"):
        PonderingForCausalLM.from_pretrained(tmp_path / folder)
    assert not (tmp_path / "no").exists()
