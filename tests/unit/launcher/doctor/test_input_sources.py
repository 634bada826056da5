"""What a host reports about the model and the data of a recipe."""

from launcher.doctor import input_sources


def test_sources_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for directory in ("empty", "model"):
        (tmp_path / directory).mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "d.csv").write_text("text,label\n")
    models = {
        name: {"kind": "model", "name": name} for name in ("model", "empty", "./no", "no/such", "package://no/m")
    }
    data = {name: {"kind": "dataset", "name": name} for name in ("d.csv", "e.csv")}
    data["csv"] = {"kind": "dataset", "name": "csv", "files": {"train": ["d.*"], "test": "f.csv"}}
    seen = input_sources.inspect_sources({**models, **data})
    assert {key: source["problem"] for key, source in seen.items() if key != "package://no/m"} == {
        "model": None,
        "empty": "it has no config.json",
        "./no": "no such file or directory",
        "no/such": None,
        "d.csv": None,
        "e.csv": "no such file or directory",
        "csv": "no such file: f.csv",
    }
    assert "'no' is not an installed package" in seen["package://no/m"]["problem"]
    assert (seen["no/such"]["place"], seen["no/such"]["cached"], seen["no/such"]["offline"]) == ("hub", False, True)
    before = seen["model"]["content"]
    (tmp_path / "model" / "config.json").write_text("{ }")
    assert input_sources.inspect_sources(models)["model"]["content"] != before


def test_gguf_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    names = ("model.gguf", "./no.gguf", "org/repo/model.gguf")
    seen = input_sources.inspect_sources({name: {"kind": "model", "name": name} for name in names})
    assert [source["place"] for source in seen.values()] == ["file", "directory", "hub"]
    assert [source["problem"] for source in seen.values()] == [None, "no such file or directory", None]
    assert (seen["org/repo/model.gguf"]["path"], seen["org/repo/model.gguf"]["cached"]) == ("org/repo", False)


def test_scalars_are_counted_from_headers(tmp_path):
    import torch
    from safetensors.torch import save_file

    assert input_sources.count_scalars(tmp_path) is None
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(())}, tmp_path / "model-1.safetensors")
    save_file({"c": torch.zeros(7)}, tmp_path / "model-2.safetensors")
    assert input_sources.count_scalars(tmp_path) == 23
    (tmp_path / "model-2.safetensors").write_bytes(b"cut")
    assert input_sources.count_scalars(tmp_path) is None
