"""training.chunked_loss against the model's own loss."""

import copy

import pytest
import torch
from accelerate import ParallelismConfig
from families import VOCABULARY, tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_outputs import CausalLMOutputWithPast

import rpn
from sparse_zero import SparseConfig, SparseTrainer, UserError, sparsify
from sparse_zero.data.metrics import language_model_metrics, token_losses
from sparse_zero.recipe.recipe import load_recipe
from sparse_zero.recipe.training import TrainingArguments
from sparse_zero.training import chunked_loss
from sparse_zero.training.chunked_loss import ChunkedLoss
from sparse_zero.training.run import noisy_objective

pytestmark = pytest.mark.skipif(
    not hasattr(nn.functional, "linear_cross_entropy"), reason="torch has linear_cross_entropy from 2.13 on"
)
HEADS = ["frozen", "selected", "whole", "tied"]


def sparse_llama(head="frozen", **settings):
    """A Llama with selected scalars in its value projections, and in its head or not."""
    model, positions = tiny("llama", tie_word_embeddings=head == "tied", **settings), {}
    selected = {"selected": "lm_head.weight", "tied": "model.embed_tokens.weight"}.get(head, "v_proj.weight")
    for name, parameter in model.named_parameters():
        if name.endswith(("v_proj.weight", selected)):
            positions[name] = torch.arange(3, parameter.numel(), 37)
    whole = ["lm_head"] if head == "whole" else None
    return sparsify(model, SparseConfig(modules_to_save=whole), positions=positions)


def batch(rows=3, length=9, seed=0):
    """Rows of different lengths: labels that are ignored at both ends."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    for row in range(rows):
        labels[row, : row + 1] = labels[row, length - row :] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model, loss):
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, trained.values(), allow_unused=True), strict=True))


def both(model, inputs, items=None, **others):
    """The loss and its gradients, from the model's own loss and in chunks."""
    number = {} if items is None else {"num_items_in_batch": items}
    found = []
    for chunked in (False, True):
        if chunked:
            with ChunkedLoss(model).computing(inputs, items):
                output = model(**inputs, **number, **others)
            assert output.logits.shape == ()
        else:
            output = model(**inputs, **number, **others)
            assert output.logits.shape == (*inputs["input_ids"].shape, VOCABULARY)
        found.append((output.loss, gradients(model, output.loss)))
    return found


def assert_equal(plain, chunked):
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("items", [None, 13, torch.tensor(13)])
def test_equal_loss_and_gradients(head, items):
    plain, chunked = both(sparse_llama(head), batch(), items)
    assert_equal(plain, chunked)
    assert plain[0].dtype == chunked[0].dtype
    trained = [name for name, gradient in chunked[1].items() if gradient is not None and gradient.any()]
    assert any("head" in name or "embed" in name for name in trained) == (head != "frozen")


# Biases in the head (phi, gpt2 has none), Conv1D, other names, experts with their own loss


@pytest.mark.parametrize(
    ("family", "settings", "inputs"),
    [
        ("gpt2", {}, {}),
        ("phi", {}, {}),
        ("opt", {}, {}),
        ("qwen3", {}, {}),
        ("gpt_neox", {}, {}),
        ("gemma2", {"final_logit_softcapping": None}, {}),
        ("mixtral", {"num_local_experts": 3}, {"output_router_logits": True}),
    ],
)
def test_families(family, settings, inputs):
    model = tiny(family, **settings)
    model.eval()  # without dropout
    if model.get_output_embeddings().bias is not None:
        nn.init.normal_(model.get_output_embeddings().bias)
    plain, chunked = both(model, batch(), 13, **inputs)
    assert_equal(plain, chunked)


def test_nothing_to_predict():
    """The mean of nothing is not a number in both, and the sum is 0."""
    inputs = batch()
    inputs["labels"][:] = -100
    model = sparse_llama()
    assert all(loss.isnan() for loss, _ in both(model, inputs))
    plain, chunked = both(model, inputs, 5)
    assert_equal(plain, chunked)


def test_labels_that_are_shifted_already():
    inputs = batch()
    shifted = {"shift_labels": nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()}
    model = sparse_llama()
    plain, _ = both(model, inputs)
    with ChunkedLoss(model).computing(inputs | shifted, None):
        loss = model(**inputs | shifted).loss
    torch.testing.assert_close(loss, plain[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", ["frozen", "selected"])
def test_autocast(head):
    """In bfloat16 the products are rounded as those of the plain head."""
    model = sparse_llama(head)
    with torch.autocast("cpu", torch.bfloat16):
        plain, chunked = both(model, batch())
    torch.testing.assert_close(chunked[0], plain[0], rtol=1e-2, atol=0)
    for name, gradient in plain[1].items():
        torch.testing.assert_close(chunked[1][name], gradient, rtol=0.05, atol=0.05 * float(gradient.abs().max()))


def test_the_model_is_as_before_afterwards():
    model = sparse_llama("selected")
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with ChunkedLoss(model).computing(batch(), None):
        assert model.loss_function is chunked_loss._pass_on
    with pytest.raises(ValueError, match="exactly one of input_ids"), ChunkedLoss(model).computing(batch(), None):
        model(input_ids=None, inputs_embeds=None)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    copied = copy.deepcopy(model)
    assert_equal(copied(**batch()).loss, model(**batch()).loss)


# Memory, without a clock


class _Largest(TorchDispatchMode):
    """The size of the largest tensor that an operation returns, in scalars."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))])
        return result


@pytest.mark.parametrize("head", ["frozen", "selected", "whole"])
def test_no_tensor_has_the_size_of_the_logits(head):
    """256 tokens and a vocabulary of 4,096: about a million logits. The head itself has 65,536 scalars."""
    model = sparse_llama(head, vocab_size=4096)
    inputs, logits = {"input_ids": torch.randint(3, 4096, (4, 64))}, 4 * 64 * 4096
    inputs["labels"] = inputs["input_ids"]
    loss, largest, saved = ChunkedLoss(model), {}, {}
    for chunked in (False, True):
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t)
        with _Largest() as seen:
            with hooks:
                if chunked:
                    with loss.computing(inputs, None):
                        result = model(**inputs).loss
                else:
                    result = model(**inputs).loss
            result.backward()
        largest[chunked], saved[chunked] = seen.size, max(sizes)
    assert (largest[False], saved[False]) == (logits, logits)
    # The chunks of the logits are as large as the hidden states, or twice; the rest is the head
    assert largest[True] <= 4096 * 16
    assert saved[True] <= 4096 * 16


# In a Trainer

ROWS = [
    {"input_ids": row, "labels": [-100] * (index % 5) + row[index % 5 :]}
    for index, row in enumerate([[3 + (row * 7 + column) % 50 for column in range(12)] for row in range(48)])
]


def losses(out, head="frozen", objective=None, rows=ROWS, **settings):
    """The losses and gradient norms of a run, and its evaluation."""
    known = {
        "use_cpu": True,
        "report_to": "none",
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
    }
    known |= {"gradient_accumulation_steps": 2, "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True}
    model = sparse_llama(head)
    arguments = TrainingArguments(str(out), **known | settings)
    trainer = SparseTrainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows[:6],
        objective=objective and objective(model, arguments),
        compute_metrics=language_model_metrics,
        preprocess_logits_for_metrics=token_losses,
    )
    trainer.train()
    log = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    assert len(log) == known["max_steps"]
    return torch.tensor(log), trainer.evaluate()["eval_token_loss"]


def noisy(model, arguments):
    return noisy_objective(model, rpn.RPNConfig(probability=0.2), arguments)


@pytest.mark.parametrize(
    ("head", "settings"),
    [
        *((head, {}) for head in HEADS),
        ("frozen", {"objective": noisy}),
        ("selected", {"objective": noisy}),
        ("selected", {"gradient_checkpointing": True}),
        ("selected", {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
        ("whole", {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    ],
)
def test_the_same_run(tmp_path, head, settings):
    plain, plain_evaluation = losses(tmp_path / "plain", head, **settings)
    chunked, evaluation = losses(tmp_path / "chunked", head, chunked_loss=True, **settings)
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-5)
    # The evaluation has logits
    assert evaluation == pytest.approx(plain_evaluation, rel=1e-5)


def test_packed_sequences(tmp_path):
    rows = [row | {"position_ids": [*range(5), *range(7)]} for row in ROWS]
    for row in rows:
        row["labels"] = [*row["labels"][:5], -100, *row["labels"][6:]]
    plain, _ = losses(tmp_path / "plain", rows=rows)
    chunked, _ = losses(tmp_path / "chunked", rows=rows, chunked_loss=True)
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-5)


def test_training_has_no_logits(tmp_path, monkeypatch):
    """A run computes in chunks indeed: the model's own loss is never called in a training step."""
    called = []
    monkeypatch.setattr(chunked_loss, "_pass_on", lambda logits, *_, **__: (called.append(logits.shape), logits)[1])
    losses(tmp_path, chunked_loss=True)
    assert called == [()] * 8


# Bad input


def with_own_loss(model):
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    return model


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (lambda: tiny("gemma2"), "Gemma2ForCausalLM: it does more with its logits than to pass them to its loss"),
        (lambda: tiny("granite"), "GraniteForCausalLM: it does more with its logits"),
        (lambda: tiny("cohere"), "CohereForCausalLM: it does more with its logits"),
        (lambda: tiny("llama", "sequence-classification"), "LlamaForSequenceClassification: its head is not a linear"),
        (
            lambda: tiny("bert", "sequence-classification"),
            "its head is not a linear layer of the vocabulary (it is none)",
        ),
        (lambda: with_own_loss(tiny("llama")), "its loss function is not the causal one of transformers"),
    ],
)
def test_models_with_another_loss_are_refused(model, complaint):
    model = model()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(UserError) as refused:
        ChunkedLoss(model)
    assert str(refused.value).startswith("training.chunked_loss: not for ")
    assert complaint in str(refused.value)
    assert str(refused.value).endswith("; set it to false")
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before


def edited_forward(change):
    """A Llama whose forward changes what its loss function gets."""
    model = tiny("llama")

    def forward(input_ids=None, labels=None, **kwargs):
        hidden = model.model(input_ids=input_ids).last_hidden_state
        logits, labels, size = change(model.lm_head(hidden), labels, VOCABULARY)
        return CausalLMOutputWithPast(loss=model.loss_function(logits, labels, size), logits=logits)

    model.forward = forward
    return model


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda logits, labels, size: (torch.zeros(1, 2, size), labels, size), "does not get its logits as they are"),
        (lambda logits, labels, size: (logits, labels + 1, size), "it changes its labels before its loss"),
        (lambda logits, labels, size: (logits, labels, size + 1), "its loss has 97 classes and its head 96"),
    ],
)
def test_a_forward_that_changes_something_is_refused(change, complaint):
    with pytest.raises(UserError, match=complaint):
        ChunkedLoss(edited_forward(change))


def test_a_forward_that_passes_no_number_of_items():
    """Its plain loss is the mean of the batch, and so is the one in chunks."""
    model = edited_forward(lambda *unchanged: unchanged)
    plain, chunked = both(model, batch(), 13)
    assert_equal(plain, chunked)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"label_smoothing_factor": 0.1}, "training.label_smoothing_factor needs the logits"),
        ({"use_liger_kernel": True}, "training.use_liger_kernel computes the loss in chunks too; set one of them"),
    ],
)
def test_other_settings_of_the_loss(tmp_path, settings, complaint):
    with pytest.raises(UserError, match=complaint):
        losses(tmp_path, chunked_loss=True, **settings)


def test_a_batch_without_labels(tmp_path):
    """The Trainer's own error."""
    with pytest.raises(ValueError, match="did not return a loss"):
        losses(tmp_path, rows=[{"input_ids": row["input_ids"]} for row in ROWS], chunked_loss=True)


def test_float16(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", chunked_loss=True)
    arguments.fp16 = True
    with pytest.raises(UserError, match=r"does not fit into float16; set training.bf16 instead of training.fp16"):
        SparseTrainer(sparse_llama(), arguments)
    model = sparse_llama().half()
    with pytest.raises(UserError, match="does not fit into float16"), ChunkedLoss(model).computing(batch(), None):
        model(**batch())


def test_sequence_parallelism(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", chunked_loss=True)
    arguments.parallelism_config = ParallelismConfig()
    with pytest.raises(UserError, match=r"not together with training.parallelism_config"):
        SparseTrainer(sparse_llama(), arguments)


def test_a_loss_function_of_the_trainer(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", chunked_loss=True)
    with pytest.raises(UserError, match="compute_loss_func needs the logits"):
        SparseTrainer(sparse_llama(), arguments, compute_loss_func=lambda *_, **__: None)


def test_an_older_torch(monkeypatch):
    monkeypatch.delattr(nn.functional, "linear_cross_entropy")
    with pytest.raises(UserError, match=r"training.chunked_loss: needs torch 2.13 or later, not .*; set training.use"):
        ChunkedLoss(sparse_llama())


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("training.chunked_loss=true", "training.chunked_loss: only causal language models have such a loss"),
        ("training.chunked_los=true", "unknown key 'chunked_los' in section 'training'; did you mean 'chunked_loss'?"),
    ],
)
def test_in_a_recipe(override, complaint):
    from sparse_zero.recipe.training import check_training

    with pytest.raises(UserError) as refused:
        check_training(load_recipe("demo.yaml", [override]).training)
    assert complaint in str(refused.value)
