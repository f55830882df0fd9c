"""What gets in: two plain files, within limits, and nothing that only looks like an adapter."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shoal.adapters.errors import AdapterRejected, AdapterTooLarge
from shoal.adapters.formats.base import Format, registry_of
from shoal.adapters.formats.container import tensor_chunks
from shoal.adapters.reading import FORMATS, adapter_files


@pytest.mark.parametrize(
    "name",
    [
        "../adapter_config.json", "a/adapter_model.safetensors", "/etc/passwd", "..", "", ".",
        "a\\b", "x\0y", "C:\\adapter_config.json",
    ],
)  # fmt: skip
def test_name_with_a_path_is_refused(golden: Any, name: str) -> None:
    files = adapter_files(golden.copy("lora"))
    with pytest.raises(AdapterRejected, match="must be a plain name"):
        golden.read_files(files | {name: files["adapter_config.json"]})


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "x.PT", "training_args.pkl", "m.pth", "a.ckpt"]
)
def test_pickle_is_refused_and_never_opened(golden: Any, name: str, tmp_path: Path) -> None:
    files = adapter_files(golden.copy("lora"))
    with pytest.raises(AdapterRejected, match=r"is a pickle.*shoal adapters convert"):
        golden.read_files(files | {name: tmp_path / "does-not-exist"})


def test_pickle_under_the_name_of_safetensors_is_refused(golden: Any) -> None:
    case = golden.copy("lora")
    (case / "adapter_model.safetensors").write_bytes(pickle.dumps({"a": 1}, protocol=0) * 9)
    with pytest.raises(AdapterRejected, match="is no safetensors file, or its header is too long"):
        golden.read(case)
    torch.save({"a": torch.ones(3)}, case / "adapter_model.safetensors")
    with pytest.raises(AdapterRejected, match="is no safetensors file"):
        golden.read(case)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_and_surplus_files_are_named(golden: Any, missing: str) -> None:
    files = adapter_files(golden.copy("lora"))
    with pytest.raises(AdapterRejected, match=rf"file {missing}: is missing"):
        golden.read_files({name: path for name, path in files.items() if name != missing})
    with pytest.raises(AdapterRejected, match=r"file notes\.txt: is not part of an adapter"):
        golden.read_files(files | {"notes.txt": files[missing]})


def test_limits_on_bytes(golden: Any) -> None:
    case = golden.copy("lora")
    size = sum(path.stat().st_size for path in case.iterdir())
    golden.read(case, max_bytes=size)
    with pytest.raises(AdapterTooLarge, match=f"hold {size} bytes, the limit is {size - 1}"):
        golden.read(case, max_bytes=size - 1)
    (case / "adapter_config.json").write_text(json.dumps({"x": "y" * (1 << 20)}))
    with pytest.raises(AdapterTooLarge, match=r"adapter_config\.json"):
        golden.read(case, max_bytes=1 << 30)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "must be a JSON object"),
        (b"[1]", "must be a JSON object, not list"),
        (b"null", "must be a JSON object"),
        (b"{", "must be a JSON object"),
        (b'{"r": 1, "r": 2}', r"adapter_config\.json: r: the key is given twice"),
        (b'{"a": {"b": 1, "b": 1}}', "b: the key is given twice"),
        (b'{"r": NaN}', "NaN is not JSON"),
        (b'{"r": -Infinity}', "Infinity is not JSON"),
        (b"\xff\xfe{}", "UTF-8"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "nested at most 32"),
        (b"[" * 500_000, "nested at most 32"),
        (b'{"a":' * 150_000, "nested at most 32"),
        (b'{"r": 1' + b"0" * 5000 + b"}", "must be a JSON object"),
        (b'{"peft_type": "\\ud800"}', r"peft_type: is \\ud800"),
    ],
)
def test_bad_config_is_refused(golden: Any, text: bytes, message: str) -> None:
    case = golden.copy("lora")
    (case / "adapter_config.json").write_bytes(text)
    with pytest.raises(AdapterRejected, match=message) as caught:
        golden.read(case)
    str(caught.value).encode()


def test_sub_folder_of_a_named_adapter_is_found(golden: Any) -> None:
    case = golden.copy("miss_named")
    assert adapter_files(case.parent.parent / "cases") == adapter_files(case)
    (case.parent / "other").mkdir()
    (case.parent / "other" / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterRejected, match="is missing in cases"):
        adapter_files(case.parent)


def test_directory_with_only_a_pickle_is_refused_with_advice(golden: Any) -> None:
    case = golden.copy("lora")
    (case / "adapter_model.safetensors").rename(case / "adapter_model.bin")
    with pytest.raises(AdapterRejected, match=r"adapter_model\.bin: is a pickle"):
        golden.read(case)
    (case / "adapter_model.bin").unlink()
    with pytest.raises(AdapterRejected, match=r"adapter_model\.safetensors: is missing"):
        golden.read(case)


def test_unserved_family_is_refused_by_its_tensor(golden: Any) -> None:
    case = golden.edit_config(golden.copy("lora"), peft_type="VERA")
    golden.save(case, {"base_model.model.x.psoft_R": torch.zeros(2, 2)})
    with pytest.raises(AdapterRejected, match=r"x\.psoft_R: is not served"):
        golden.read(case)
    golden.save(case, {"base_model.model.x.new_kind": torch.zeros(2, 2)})
    with pytest.raises(AdapterRejected, match=r"belongs to no format .*peft_type VERA"):
        golden.read(case)
    save_file({}, case / "adapter_model.safetensors")
    with pytest.raises(AdapterRejected, match="holds no tensors"):
        golden.read(case)


def test_same_bytes_for_the_same_tensors() -> None:
    tensors = {
        "b": torch.ones(3, dtype=torch.bfloat16),
        "a": torch.eye(2),
        "c": torch.ones(1).half(),
    }
    one = b"".join(tensor_chunks(tensors, {"y": "1", "x": "2"}))
    two = b"".join(tensor_chunks(dict(reversed(tensors.items())), {"x": "2", "y": "1"}))
    assert one == two


def a_format(**changes: Any) -> Format:
    fields: dict[str, Any] = {
        "name": "new",
        "markers": frozenset({"new_a"}),
        "kinds": frozenset({"new_a", "new_b"}),
        "peft_types": frozenset({"NEW"}),
        "read": lambda raw, context: None,
    }
    return Format(**fields | changes)


def test_registering_a_format_checks_it() -> None:
    assert FORMATS.names()[-1] == "lora"  # its tensors are in others' files too
    registry = registry_of([a_format()])
    for bad, message in [
        (a_format(), "registered already"),
        (a_format(name="New"), "lower case"),
        (a_format(name="x", markers=frozenset()), "markers"),
        (a_format(name="x", markers=frozenset({"z"})), "markers"),
        (a_format(name="x", peft_types=frozenset()), "peft_types"),
        (a_format(name="x"), "shares the markers"),
    ]:
        with pytest.raises(ValueError, match=message):
            registry.register(bad)
    assert registry.names() == ("new",)
