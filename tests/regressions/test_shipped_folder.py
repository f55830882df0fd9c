"""Adapter folders inside a model's directory were published as if they shipped with shoal."""

from pathlib import Path

from shoal.server.assemble import SHIPPED, shipped_folder


def test_only_a_base_known_by_name_has_shipped_adapters(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert shipped_folder("smollm2") == SHIPPED / "smollm2"
    for model in (str(tmp_path), "/", ".", "..", "../shipped/smollm2", "smollm2/", "model.gguf"):
        assert shipped_folder(model) is None, model
