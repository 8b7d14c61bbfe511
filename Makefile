# One command per thing a person wants; each makes the environment by itself when it is missing.
#   make demo     teacher -> cache -> students -> comparison -> report, on the built-in default
#   make test     the tests
# CONFIG=path.yaml chooses another config for cache-teacher, train-student and teacher.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
RUN := $(VENV)/bin/python
STILLROOM := $(VENV)/bin/stillroom
# One thread per process: tiny models lose more to waiting for threads than they gain.
TEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --dist loadfile
CONFIGS := stages/configs

# Without bytecode every process compiles torch and transformers anew, longer than most tests take.
unexport PYTHONDONTWRITEBYTECODE

DEMO_CACHE := data/caches/demo/manifest.json
DEMO_STUDENTS := demo-labels demo-kd demo-kd-hidden demo-kd-wide
DEMO_CONFIGS := $(DEMO_STUDENTS:%=$(CONFIGS)/student/%.yaml)
# Students are trained in this order, so where the last result stands all of them do.
DEMO_RESULTS := $(lastword $(DEMO_STUDENTS:demo-%=runs/demo/%/result.json))
REPORT := runs/demo/report.html
SIB200_STUDENTS := $(addprefix sib200-,labels kd kd-pooled labels-unseen kd-unseen)

.PHONY: demo cache-teacher train-student compare teacher sib200 proof bench test torture flips fuzz check clean help
.DEFAULT_GOAL := help

help:  ## list the commands
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

demo: $(REPORT)  ## the main job: one teacher, one cache, four students, one report

ifdef CONFIG
cache-teacher: | $(READY)
	$(STILLROOM) cache-teacher $(CONFIG)
train-student: | $(READY)
	$(STILLROOM) train-student $(CONFIG)
teacher: | $(READY)
	$(STILLROOM) train-teacher $(CONFIG)
else
cache-teacher: $(DEMO_CACHE)  ## run the teacher once and keep what it says [CONFIG=...]
train-student: $(DEMO_RESULTS)  ## train students from a cache [CONFIG=...]
teacher: runs/teacher/result.json  ## train the demo's teacher by its recipe [CONFIG=...]
endif

compare: | $(READY)  ## compare the runs below RUNS (default runs/demo) in a table and report.html
	$(STILLROOM) compare $(or $(RUNS),runs/demo) --output $(or $(RUNS),runs/demo)/report.html

sib200: | $(READY)  ## the second recipe: topics in 24 languages [TEACHER=folder of MiniLM]
	$(STILLROOM) train-teacher sib200 $(if $(TEACHER),--set model.model=$(TEACHER))
	$(STILLROOM) cache-teacher sib200
	$(STILLROOM) train-student $(SIB200_STUDENTS)
	$(STILLROOM) compare runs/sib200 --output runs/sib200/report.html

proof: | $(READY)  ## students of every recipe over three seeds, in tables [TRIAL=name] [TEACHER=folder]
	$(RUN) -m stages.proof $(TRIAL) $(if $(TEACHER),--teacher $(TEACHER))

bench: | $(READY)  ## speed and size, each beside its baseline [QUICK=1]
	$(RUN) -m stages.bench $(if $(QUICK),--quick)

test: | $(READY)  ## the tests
	$(TEST)

torture: | $(READY)  ## stop every stage at its file operations, and see that nothing is lost [POINTS=600]
	OMP_NUM_THREADS=1 $(RUN) -m tests.torture --points $(or $(POINTS),600)
	STILLROOM_LONG=1 $(TEST) tests/test_disk_full.py tests/test_sharing.py tests/test_storage_cache.py tests/test_storage_commands.py

flips: | $(READY)  ## damage caches by one bit or byte, 12,000 times, and see that it is found
	STILLROOM_FLIPS=2000 $(TEST) tests/test_bit_flips.py

fuzz: | $(READY)  ## feed readers with hostile caches [SECONDS=600]
	PYTHONPATH=. $(RUN) tests/fuzz.py --seconds $(or $(SECONDS),600)
	PYTHONPATH=. $(RUN) tests/fuzz_guided.py --seconds $(or $(SECONDS),600)

check: | $(READY)  ## lint, format, types, tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(TEST)

clean:  ## remove what demo, test and check made; other caches and the environment stay
	rm -rf data/caches/demo runs/demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The environment: exact versions, by uv because it takes seconds where pip takes minutes.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check uv==0.13.8
	$(RUN) -m uv pip install --quiet --python $(RUN) -r requirements.lock
	$(RUN) -m uv pip install --quiet --python $(RUN) --no-deps --no-build-isolation --editable .
	@touch $@

$(DEMO_CACHE): $(CONFIGS)/cache/demo.yaml data/teachers/demo/model.safetensors | $(READY)
	$(STILLROOM) cache-teacher demo
	@touch $@

# All students in one process: importing the libraries takes longer than reading the cache.
$(DEMO_RESULTS): $(DEMO_CACHE) $(DEMO_CONFIGS)
	$(STILLROOM) train-student $(DEMO_STUDENTS)
	@touch $@

$(REPORT): $(DEMO_RESULTS)
	$(STILLROOM) compare runs/demo --output $@

runs/teacher/result.json: $(CONFIGS)/teacher/demo.yaml | $(READY)
	$(STILLROOM) train-teacher demo --set output=runs/teacher
	@touch $@
