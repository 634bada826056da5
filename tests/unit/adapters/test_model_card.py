"""The model card of an adapter."""

import yaml
from adapter_cases import trained

from sparse_zero.adapters.files import read_config
from sparse_zero.adapters.save_and_load import save_adapter


def test_the_model_card_tells_the_figures(bases, tmp_path):
    model = trained(bases["bert"])
    model.sparsity.base_model = "org/base"
    model.sparsity.results = {"accuracy": 0.81254, "accuracy_before": 0.5, "loss": 0.4, "eval_examples": 1000}
    save_adapter(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "library_name": "sparse-zero",
        "tags": ["sparse-zero", "sparta", "adapter"],
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "metrics": ["accuracy"],
        "pipeline_tag": "text-classification",
    }
    assert f"{model.sparsity.trainable_parameters:,} of {model.sparsity.total_parameters:,} scalars" in card
    assert "on 1,000 held-out examples" in card
    assert "| accuracy | 0.5 | 0.8125 |" in card
    assert "| loss |  | 0.4 |" in card
    assert "num_labels=3" in card
    assert read_config(tmp_path).results == model.sparsity.results


def test_the_model_card_opens_what_a_package_ships(bases, tmp_path):
    model = trained(bases["llama"])
    model.sparsity.base_model = "package://some/model"
    save_adapter(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    compile(code, "README.md", "exec")
    assert 'AutoModelForCausalLM.from_pretrained(package_path("package://some/model"))' in code
    assert "from sparse_zero import load_adapter, package_path" in code
