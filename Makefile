# The developer's commands; PYTHON names the environment to use.
PYTHON ?= python
CLANG_FORMAT = $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_path('scripts'))")/clang-format
CSRC = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl')

.PHONY: build test test-isa test-amx test-torch-range asan tsan bench lint format clean

build:  ## compile what has changed and put gptfast/_C*.so in place
	$(PYTHON) setup.py --quiet build_ext --inplace

test: build
	$(PYTHON) -m pytest

# The linker keeps one of all weak symbols of a name: code for one instruction set could then run at
# another level. Hence no kernel object may have any; the one of exception handling is an address.
test-isa: build
	nm -A build/temp/isa_*.o > build/temp/isa.symbols
	! grep ' [WVu] ' build/temp/isa.symbols | grep -v ' V DW.ref.__gxx_personality_v0'

# The AMX kernels on a processor without AMX, their tiles emulated, in a copy of the tree.
EMULATED = build/emulated
test-amx:
	mkdir -p $(EMULATED)
	rm -rf $(addprefix $(EMULATED)/,benchmarks csrc gptfast tests)
	cp -rp benchmarks csrc gptfast tests setup.py pyproject.toml $(EMULATED)
	rm -f $(EMULATED)/gptfast/_C*.so
	cd $(EMULATED) && GPTFAST_AMX_EMULATED=1 $(PYTHON) setup.py --quiet build_ext --inplace
	cd $(EMULATED) && $(PYTHON) -m pytest -k amx tests

# Every version of torch that pip has, from the oldest of pyproject.toml on: its headers, and tests on
# the extension of the newest. Some 3 GB are downloaded, and up to 3 GB of disk taken, for a while.
test-torch-range: build
	$(PYTHON) tests/torch_range.py

# Kernels and engine under AddressSanitizer and UBSan, on shapes where they could miss an end, and
# under ThreadSanitizer; each group of cases, all or those named in CASES, is a process of its own.
asan: SANITIZERS = address,undefined
tsan: SANITIZERS = thread
asan tsan:
	$(PYTHON) tests/sanitize/build.py build/$@ $(SANITIZERS)
	build/$@/harness list > build/$@/groups
	echo $(or $(CASES),$$(cat build/$@/groups)) | \
		xargs -n 1 -P $${MAX_JOBS:-$$(nproc)} build/$@/harness

# Each script in a process of its own. The pictures are to be looked at, not committed. TEXT is
# Shakespeare as a file, where it cannot be downloaded.
benchmark = PYTHONPATH=$(CURDIR) $(PYTHON) benchmarks/$(1).py $(3) \
	--out benchmarks/results/$(2).json --plot benchmarks/results/$(2).png
bench: build
	$(call benchmark,bench_attention,attention)
	$(call benchmark,bench_ffn,ffn)
	$(call benchmark,bench_cross_entropy,cross_entropy)
	$(call benchmark,bench_train,train,--memory)
	$(call benchmark,bench_generate,generate)
	$(call benchmark,loss_curves,loss_curves,$(if $(TEXT),--data $(TEXT)))
	$(PYTHON) benchmarks/report.py

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror $(CSRC)

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(CLANG_FORMAT) -i $(CSRC)

clean:
	rm -rf build dist *.egg-info gptfast/_C*.so gptfast/_build_info.json
