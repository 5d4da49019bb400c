# Every target sets itself up: a virtual environment in .venv, and what requirements*.txt name.
PYTHON ?= python3
BIN := .venv/bin
NULL_CUDA ?= .null_cuda
export PYTHONUNBUFFERED = 1

.PHONY: demo test lint smoke test-faults test-gpu test-null-cuda bench-data bench-gpu clean

demo: .venv/installed  ## train for two minutes, carry on a melody, write sounds, a picture and a page
	rm -rf demo && mkdir -p demo
	cd examples/demo/val && ls > ../../../demo/val.txt
	$(BIN)/python train_rvq.py --data examples/demo/train examples/demo/val --val-list demo/val.txt \
	    --save_dir demo/run --device cpu --d_model 128 --layers 4 --heads 4 --dropout 0 \
	    --ctx 256 --step 117 --batch 4 --accum 1 --warmup-ratio 0.05 \
	    --label-smoothing 0 --max-seconds 110 --log-lr-steps 20 --val-every-seconds 16 \
	    --eval-audio-every 1 --eval-frames 645 --eval-dac-repo demo
	$(BIN)/python examples/demo.py demo/run/rvq_9cb_best.pt --out-dir demo

test: lint  ## everything that CI checks
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not cuda"

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

smoke: .venv/installed  ## a fixed tiny run; a refactor must print the same loss
	rm -rf smoke_ckpts demo_codes
	$(BIN)/python examples/make_codes.py demo_codes
	OMP_NUM_THREADS=2 $(BIN)/python train_rvq.py --data demo_codes --device cpu --d_model 64 --layers 2 --heads 2 \
	    --ctx 64 --batch 4 --accum 1 --max-steps 30 --save_dir smoke_ckpts
	@$(BIN)/python -c "import json; print('smoke loss', [json.loads(r)['train'] for r in \
	    open('smoke_ckpts/rvq_4cb_metrics.jsonl') if '\"epoch\"' in r[:20]][-1])"

test-faults: .venv/installed-dev  ## kills, full disks and bit flips in earnest; minutes
	$(BIN)/python -m pytest -m "slow and not cuda"

test-gpu: .venv/installed-dev  ## needs a CUDA device
	$(BIN)/python -m pytest -m cuda

test-null-cuda:  ## CUDA's paths on a device that computes nothing; 5.5 GB once, and a quarter of an hour
	PYTHON=$(PYTHON) tests/null_cuda/build.sh $(NULL_CUDA)
	tests/null_cuda/on_device $(NULL_CUDA) -m pytest tests/null_cuda

bench-data: .venv/installed  ## window speed and memory
	$(BIN)/python benchmarks/data_path.py

bench-gpu: .venv/installed  ## frames/s, MFU, memory and compile time of the usual runs on a GPU
	$(BIN)/python benchmarks/gpu.py

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv demo demo_codes smoke_ckpts
