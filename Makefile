# Commands for developers; PYTHON selects the environment.
PYTHON ?= python
SCRIPTS = $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_path('scripts'))")
CLANG_FORMAT = $(SCRIPTS)/clang-format
CSRC = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl')

.PHONY: build test test-isa test-amx emulated-amx test-kill test-torch-range asan tsan bench docs examples lint format clean
.PHONY: wheel sdist test-wheel test-sdist test-ecosystem

build:  ## compile what has changed and write gptfast/_C*.so
	$(PYTHON) setup.py --quiet build_ext --inplace

test: build
	$(PYTHON) -m pytest

# Of weak symbols of the same name the linker keeps only one, so code for one instruction set could
# run at another level. No kernel object may therefore have weak symbols; the exception, that of
# exception handling, is only an address.
test-isa: build
	nm -A build/temp/isa_*.o > build/temp/isa.symbols
	! grep ' [WVu] ' build/temp/isa.symbols | grep -v ' V DW.ref.__gxx_personality_v0'

# Tests the AMX kernels on a processor without AMX, which must have AVX512_BF16: emulates the tiles,
# in a copy of the tree. The objects of the other levels are the same there.
EMULATED = build/emulated
test-amx:
	mkdir -p $(EMULATED)/build/temp
	$${CXX:-c++} -std=c++20 -DGPTFAST_AMX_EMULATED=1 tests/levels.cpp \
		csrc/kernels/isa/dispatch.cpp -o $(EMULATED)/levels
	if $(EMULATED)/levels | grep -qx amx; then $(MAKE) emulated-amx; \
		else echo 'left out: this machine has no AVX512_BF16'; fi

emulated-amx:
	rm -rf $(addprefix $(EMULATED)/,benchmarks csrc gptfast tests)
	cp -rp benchmarks csrc gptfast tests setup.py pyproject.toml $(EMULATED)
	rm -f $(EMULATED)/gptfast/_C*.so
	for isa in generic avx2 avx512 avx512_bf16; do \
		cp -p build/temp/isa_$$isa.* $(EMULATED)/build/temp || true; done
	cd $(EMULATED) && GPTFAST_AMX_EMULATED=1 $(PYTHON) setup.py --quiet build_ext --inplace
	cd $(EMULATED) && $(PYTHON) -m pytest -k amx --ignore tests/test_docs.py tests

# Kills runs at 100 random moments and goes on with them.
test-kill: build
	PYTHONPATH=$(CURDIR) $(PYTHON) tests/kill_runs.py

# Compiles against the headers of every torch that pip offers, from the oldest in pyproject.toml on,
# and tests the extension of the newest with some. Downloads some 3 GB; uses up to 3 GB of disk.
test-torch-range: build
	$(PYTHON) tests/torch_range.py

# The wheel for this Python goes into dist/. It has none of torch's libraries: the extension finds
# those that the process has loaded. setuptools would keep files of earlier builds.
wheel: export DEBUG =
wheel: export GPTFAST_AMX_EMULATED =
wheel:
	rm -rf build/lib.* build/bdist.* build/wheel *.egg-info
	$(PYTHON) -m build --no-isolation --wheel --outdir build/wheel
	PATH="$(SCRIPTS):$$PATH" $(PYTHON) -m auditwheel repair --exclude libtorch_cpu.so \
		--wheel-dir dist build/wheel/*.whl

sdist:
	rm -rf *.egg-info
	$(PYTHON) -m build --no-isolation --sdist

# Installs the wheel in an environment without a compiler and runs a program there.
newest = $$(ls -t $(1) | head -n 1)
test-wheel: wheel
	GPTFAST_WHEEL="$(call newest,dist/*.whl)" $(PYTHON) -m pytest tests/test_wheel.py

# Builds a wheel from the source distribution, in isolation, which may download a torch, and tests it.
test-sdist: sdist
	rm -rf build/from-sdist
	$(PYTHON) -m pip wheel --no-deps --wheel-dir build/from-sdist "$(call newest,dist/*.tar.gz)"
	GPTFAST_WHEEL="$(call newest,build/from-sdist/*.whl)" \
		$(PYTHON) -m pytest -k "not manylinux" tests/test_wheel.py

# The tests of packages that are large or compiled: lm-evaluation-harness, llama.cpp.
test-ecosystem: build
	$(PYTHON) -m pip install --no-build-isolation -e ".[test,eval,peers]"
	$(PYTHON) -m pytest tests/test_lm_eval.py tests/test_gguf.py tests/test_generation_rows.py

# Runs kernels and engine under AddressSanitizer and UBSan, on shapes at which they could overrun a
# buffer, and under ThreadSanitizer. Each group of cases (CASES; default: all) is a process.
asan: SANITIZERS = address,undefined
tsan: SANITIZERS = thread
asan tsan:
	$(PYTHON) tests/sanitize/build.py build/$@ $(SANITIZERS)
	build/$@/harness list > build/$@/groups
	echo $(or $(CASES),$$(cat build/$@/groups)) | \
		xargs -n 1 -P $${MAX_JOBS:-$$(nproc)} build/$@/harness

# Each script runs in its own process. The plots are for inspection, not to be committed. TEXT names
# a file with Shakespeare, if it cannot be downloaded.
benchmark = PYTHONPATH=$(CURDIR) $(PYTHON) benchmarks/$(1).py $(3) \
	--out benchmarks/results/$(2).json --plot benchmarks/results/$(2).png
bench: build
	$(call benchmark,bench_attention,attention)
	$(call benchmark,bench_ffn,ffn)
	$(call benchmark,bench_cross_entropy,cross_entropy)
	$(call benchmark,bench_train,train,--memory)
	$(call benchmark,bench_generate,generate)
	$(call benchmark,bench_gpt2,gpt2,$(if $(TEXT),--data $(TEXT)))
	$(call benchmark,loss_curves,loss_curves,$(if $(TEXT),--data $(TEXT)))
	PYTHONPATH=$(CURDIR) $(PYTHON) benchmarks/time_to_loss.py $(if $(TEXT),--data $(TEXT)) \
		--out benchmarks/results/time_to_loss.json
	$(PYTHON) benchmarks/report.py

# The site, in build/site. A warning is an error: a link that leads nowhere, a docstring that does not
# parse. (The variable silences an advertisement of the theme's.)
docs:
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

# Executes the notebooks of examples/ in place; NOTEBOOKS names some of them.
examples: build
	PYTHONPATH=$(CURDIR) $(PYTHON) tests/run_examples.py $(NOTEBOOKS)

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m mypy --strict --follow-imports silent --cache-dir .mypy_cache/strict \
		tests/fixtures/user_script.py
	$(CLANG_FORMAT) --dry-run -Werror $(CSRC)

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(CLANG_FORMAT) -i $(CSRC)

clean:
	rm -rf build dist *.egg-info gptfast/_C*.so gptfast/_build_info.json
