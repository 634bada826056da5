import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from families import VOCABULARY, tiny
from transformers import AutoConfig

from sparse_zero.data.models import load_config, load_model, load_tokenizer, max_positions
from sparse_zero.errors import UserError


@pytest.fixture
def llama(tmp_path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def set_in_config(base: Path, **settings) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_whole_model_is_loaded_without_a_message(tmp_path, caplog, family):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), "causal-lm")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not caplog.records


def test_the_heads_of_classifiers_start_without_a_message(tmp_path, caplog):
    tiny("bert", "sequence-classification").base_model.save_pretrained(tmp_path)
    settings = {"id2label": {"0": "no", "1": "yes", "2": "so"}, "label2id": {"no": 0, "yes": 1, "so": 2}}
    model = load_model(str(tmp_path), "sequence-classification", settings=settings)
    assert model.config.id2label == {0: "no", 1: "yes", 2: "so"}
    assert model.classifier.out_features == 3
    assert not caplog.records


def test_a_language_model_without_its_head_warns(tmp_path, caplog):
    tiny("llama").model.save_pretrained(tmp_path)
    load_model(str(tmp_path), "causal-lm")
    assert "has no weights for lm_head.weight: they are initialised at random" in caplog.text


def test_a_head_for_another_number_of_labels_starts_anew(tmp_path):
    tiny("bert", "sequence-classification", num_labels=5).save_pretrained(tmp_path)
    settings = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    model = load_model(str(tmp_path), "sequence-classification", settings=settings)
    logits = model(input_ids=torch.arange(VOCABULARY)[None, 3:20]).logits
    assert logits.shape == (1, 2)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda base: (base / "config.json").write_text("{"), "is not a valid JSON file"),
        (lambda base: set_in_config(base, model_type="none"), "`none`"),
        (lambda base: (base / "model.safetensors").write_bytes(b"short"), "header too small"),
        (lambda base: (base / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda base: shutil.rmtree(base), "cannot be loaded for causal-lm"),
        (
            lambda base: set_in_config(base, intermediate_size=48),
            "mlp.down_proj.weight has the shape [16, 24] instead of [16, 48]",
        ),
    ],
    ids=["not-json", "unknown-architecture", "truncated", "no-weights", "no-directory", "other-sizes"],
)
def test_a_damaged_base_model(llama, damage, expected):
    damage(llama)
    with pytest.raises(UserError) as error:
        load_model(str(llama), "causal-lm")
    assert expected in str(error.value)
    assert f"model.name: {llama}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_do_the_task(tmp_path):
    tiny("t5", "seq2seq-lm").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded for causal-lm: Unrecognized configuration class"):
        load_model(str(tmp_path), "causal-lm")


def test_loading_leaves_the_verbosity_of_transformers_alone(llama, monkeypatch):
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "level", logging.INFO)
    load_model(str(llama), "causal-lm")
    assert logger.level == logging.INFO
    shutil.rmtree(llama)
    with pytest.raises(UserError):
        load_model(str(llama), "causal-lm")
    assert logger.level == logging.INFO


def test_a_config_and_a_tokenizer_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"model\.name: .*gone cannot be loaded"):
        load_config(str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"model\.tokenizer: the tokenizer of .*gone cannot be loaded"):
        load_tokenizer(str(tmp_path / "gone"))


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("bert", {"max_position_embeddings": 64}, 64),
        ("gpt2", {"n_positions": 32}, 32),
        ("roberta", {"max_position_embeddings": 66, "pad_token_id": 1}, 64),
        ("t5", {}, None),
        ("bloom", {}, None),
    ],
)
def test_the_longest_sequence_that_a_model_takes(family, settings, expected):
    assert max_positions(AutoConfig.for_model(family, **settings)) == expected
