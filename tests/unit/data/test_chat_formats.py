"""Which tokens count with the chat formats of some families. The formats are those that the models' cards describe."""

import pytest
from data_cases import MESSAGES, counted, language

SYSTEM, QUESTION, ANSWER, AGAIN, LAST = "Be brief.", "Good film?", "Yes.", "Really?", " It is. \n"

TEMPLATES = {
    # Qwen, SmolLM2 and others: the end of a turn is learnt, so that the model stops
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "{answer}<|im_end|>\n",
    ),
    "llama-3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
        "m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "{trimmed}<|eot_id|>",
    ),
    # Its template calls the assistant "model" and refuses a system message
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
        "{% set role = m['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + "
        "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "{trimmed}<end_of_turn>\n",
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% else %}"
        "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
        "{answer}<eos>",
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "{answer}<eos>\n",
    ),
    "phi-3": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "{answer}<|end|>\n",
    ),
    # OLMo and others mark the answer
    "marked": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}"
        "{% endfor %}",
        "{answer}<eos>",
    ),
}
NO_SYSTEM = ("gemma", "mistral")


def conversation(family, roles=("user", "assistant")):
    user, assistant = roles
    turns = [] if family in NO_SYSTEM else [{"role": "system", "content": SYSTEM}]
    return [
        *turns,
        {"role": user, "content": QUESTION},
        {"role": assistant, "content": ANSWER},
        {"role": user, "content": AGAIN},
        {"role": assistant, "content": LAST},
    ]


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("roles", [("user", "assistant"), ("human", "gpt"), ("user", "model")])
def test_the_answers_and_their_ends_count(family, roles, tokenizer):
    template, form = TEMPLATES[family]
    tokenizer.chat_template = template
    row = language(tokenizer, MESSAGES, {"messages": [conversation(family, roles)]}).train[0]
    rendered = tokenizer.apply_chat_template(conversation(family), tokenize=False)
    assert tokenizer.decode(row["input_ids"]) == rendered
    expected = "".join(form.format(answer=answer, trimmed=answer.strip()) for answer in (ANSWER, LAST))
    assert counted(row, tokenizer) == expected
