# make demo    the whole system on this machine, no robot needed: reports in runs/demo/<time>/, runs/demo-cups/<time>/
# make test    the test suite             make train-tiny  all stages at tiny size: runs/train-tiny/summary.json
# make train-sim  the policy that stacks simulated cups, for one GPU; train-sim-small: for two CPU cores (docs/vipra_sim.md)
# make lint    format and style          make colcon    build as a ROS 2 package into build/ and install/
PYTHON ?= python3
EXTRAS ?= robot,server,sim,train,test
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(EXTRAS)
# library that must be loadable : Debian and Ubuntu package that brings it
LIBRARIES := libEGL.so.1:libegl1 libGL.so.1:libgl1 libgthread-2.0.so.0:libglib2.0-0 libX11.so.6:libx11-6
DRIVER := libgl1-mesa-dri

.PHONY: .venv demo test train-tiny train-sim train-sim-small lint colcon clean system

.venv: $(STAMP)

# uv takes a quarter of pip's time; pip also knows the mirrors of its own configuration.
$(STAMP): setup.py setup.cfg | system
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip uv
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python -e '.[$(EXTRAS)]' || \
	  $(BIN)/pip install --quiet -e '.[$(EXTRAS)]'
	touch $@

# What pip cannot bring: graphics libraries for off-screen rendering and OpenCV.
system:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "needs Python 3.11 or newer: make PYTHON=/path/to/python3.12 ..."; exit 1; }
	@missing=""; \
	for pair in $(LIBRARIES); do \
	  $(PYTHON) -c "import ctypes; ctypes.CDLL('$${pair%%:*}')" 2>/dev/null || missing="$$missing $${pair##*:}"; \
	done; \
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
	[ -n "$$(ls /usr/lib*/dri/swrast_dri.so /usr/lib/*/dri/swrast_dri.so 2>/dev/null)" ] || missing="$$missing $(DRIVER)"; \
	[ -z "$$missing" ] && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; \
	else \
	  echo "missing system packages, install them first: sudo apt install$$missing"; exit 1; \
	fi

demo: .venv
	$(BIN)/vipra demo
	$(BIN)/vipra evaluate stack_cups_narrow --live --policy vipra_sim_small --seeds 0:3 \
	  --out runs/demo-cups/$$(date +%Y%m%d-%H%M%S)

# Tests of processes in real time one at a time, all others on every core.
test: .venv
	$(BIN)/pytest -n auto -m "not live"
	$(BIN)/pytest -m live

train-tiny: .venv
	$(BIN)/python -m training.tiny --out runs/train-tiny

train-sim: .venv
	$(BIN)/python -m training.sim

train-sim-small: .venv
	$(BIN)/python -m training.sim --small --ignore-gate

lint: .venv
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/lint-imports

colcon: .venv
	. $(BIN)/activate && colcon build

clean:
	rm -rf build install log *.egg-info
