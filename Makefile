# SPDX-License-Identifier: Apache-2.0
# make help lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

GO ?= go
PREFIX ?= /usr/local
DESTDIR ?=
UNITDIR ?= /etc/systemd/system

# Versions of the tools that are no dependencies of the module.
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
DEPGUARD := github.com/OpenPeeDeeP/depguard/v2/cmd/depguard@v2.2.1
CLANG := clang-19
LLVM_STRIP := llvm-strip-19

VERSION ?= $(shell git describe --tags --match 'v*' 2>/dev/null | sed 's/^v//' | grep . || echo 0.1.0-dev)
REVISION ?= $(shell git rev-parse HEAD 2>/dev/null || echo unknown)$(shell git diff --quiet HEAD 2>/dev/null || echo -modified)
VARS := github.com/prometheus/common/version
LDFLAGS := -s -w -X $(VARS).Version=$(VERSION) -X $(VARS).Revision=$(REVISION)

# Root owns the kernel; make it so only where it is needed.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

# What runs under the race detector, which slows everything down tenfold: there tests that
# measure or promise times, such as the end within 5 s, skip (kerneltest.Timed), and so the
# packages that have such tests run without it as well.
MEASURING := ./bpf/... ./cmd/... ./exporter/otlp/... ./profiler/... ./test/...
RACING := ./cmd/... ./exporter/... ./internal/... ./profiler ./symbolizer/...

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: build
build: ## Build bin/hostflame, static
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/hostflame ./cmd/hostflame

.PHONY: run
run: build ## Build and start the agent, as root; it prints where to look
	$(SUDO) ./bin/hostflame serve $(ARGS)

.PHONY: test
test: packages check-generated lint cross test-race test-fuzz test-kernel test-kernels-ci ## Run every check and test, installing what they need
	@[[ $$(id -u) == 0 ]] || echo "not root: the tests that need the kernel were skipped" >&2

.PHONY: packages
packages:
	.ci/packages

.PHONY: test-race
test-race: ## Run all but kernel and end-to-end tests with the race detector
	$(GO) test -race -p 1 -count 1 -timeout 15m $(RACING)

# -p 1: these load the machine and measure, so one package at a time.
.PHONY: test-kernel
test-kernel: build ## Run the tests of the BPF programs, the command, OTLP, and end to end
	$(GO) test -p 1 -count 1 -timeout 30m $(MEASURING)

# Of the tests that tell kernels apart, what takes seconds where the CPU is emulated: all
# objects load and attach, counts equal the kernel's books, known waits and stacks are found,
# and whose fault the waits are; samples add up, and CPUs may come and go.
# The rest says nothing more of a kernel (parsers, arithmetic), or measures for a minute.
KERNELS_CI := TestProbeAsRoot|TestCPUSample|TestTables|TestUnwindKnown|TestRequestFlags|TestBlock(Equals|Counts|ByContainer|Bio|Mapper|Mirror|ManyQueues|Detach)|TestSched(Counts|Known|CauseQuota|CauseOwn|CauseOther|Blocked|Hotplug)|TestWaits(AddUp|AllTaken|Observe|Hook)

.PHONY: test-kernels
test-kernels: ## Run the kernel tests on Linux 6.1 and 6.12, amd64 and arm64, under QEMU
	$(GO) run ./test/kernels $(ARGS)
	$(GO) run ./test/kernels -packages ./profiler/unwind -run TestUnwindKnown $(ARGS)

# Each kernel of the matrix and each architecture once.
.PHONY: test-kernels-ci
test-kernels-ci:
	$(GO) run ./test/kernels -short -packages ./bpf,./profiler/unwind -kernel 6.1 -arch amd64 -run '$(KERNELS_CI)'
	$(GO) run ./test/kernels -short -packages ./bpf,./profiler/unwind -kernel 6.12 -arch arm64 -run '$(KERNELS_CI)'

# The ordinary tests do this for a dozen files and a few releases.
.PHONY: test-unwind
test-unwind: packages ## Compare the unwind tables of all files of this machine with elfutils (20 minutes)
	$(GO) test ./profiler/unwind -run RowsAgree -all -count 1 -v -timeout 90m

# The ordinary tests do this for a corpus that they build, and the C library.
.PHONY: test-symbols
test-symbols: packages ## Compare 100,000 addresses of a kernel, and of Go binaries of each release, with the judges (800 MB to load)
	$(GO) test ./symbolizer -run 'VmlinuxAgrees|GoReleases' -vmlinux "$$(.ci/vmlinux)" -go-releases -count 1 -v -timeout 30m

# Each fuzz target for a moment, from the corpus that is kept: a number of inputs, since go
# test takes the end of a time for a failure now and then.
FUZZTIME ?= 3000x
.PHONY: test-fuzz
test-fuzz: ## Run each fuzz target of the symbolizer for FUZZTIME (10m, 3000x)
	@for dir in internal/dwarf symbolizer symbolizer/index; do \
		for target in $$(sed -n 's/^func \(Fuzz[A-Za-z]*\)(.*/\1/p' $$dir/*_test.go); do \
			echo "$$dir $$target"; \
			$(GO) test ./$$dir -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) >/tmp/hostflame-fuzz.$$$$ 2>&1 || { cat /tmp/hostflame-fuzz.$$$$; rm -f /tmp/hostflame-fuzz.$$$$; exit 1; }; \
			rm -f /tmp/hostflame-fuzz.$$$$; \
		done; \
	done

.PHONY: test-block
test-block: packages ## Hold all jobs of the pairwise list against /proc/diskstats (root, 3 minutes)
	$(SUDO) env "PATH=$$PATH" $(GO) test ./bpf -run TestBlockPairwise -all -count 1 -v -timeout 30m

.PHONY: bench
bench: packages build ## Measure the agent beside runqlat and biolatency, in one run (root)
	$(SUDO) env "PATH=$$PATH" $(GO) run ./test/bench -vmlinux "$$(.ci/vmlinux)" $(ARGS)

.PHONY: cross
cross: ## Build and vet for arm64 too
	CGO_ENABLED=0 GOARCH=arm64 $(GO) build -trimpath -o /dev/null ./cmd/hostflame
	CGO_ENABLED=0 GOARCH=arm64 $(GO) vet ./...

.PHONY: lint
lint: ## Check formatting, vet, staticcheck and the direction of imports
	@unformatted=$$(gofmt -l $$(git ls-files -co --exclude-standard '*.go')); \
	[[ -z $$unformatted ]] || { echo "gofmt -w $$unformatted" >&2; exit 1; }
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...
	$(GO) run $(DEPGUARD) ./...

.PHONY: generate
generate: clang ## Rebuild the committed BPF Go files and objects, with the pinned clang
	$(GO) generate ./...

# A copy, so that a difference leaves the tree as it was.
.PHONY: check-generated
check-generated: clang ## Check that the committed generated files are what generate makes
	@copy=$$(mktemp -d); trap 'rm -rf "$$copy"' EXIT; \
	git ls-files -co --exclude-standard | tar -c -T - | tar -x -C "$$copy"; \
	(cd "$$copy" && $(GO) generate ./...); \
	git ls-files -co --exclude-standard '*_bpfel*' | while read -r f; do \
		cmp "$$f" "$$copy/$$f" || { echo "$$f is not what its source makes: run make generate" >&2; exit 1; }; \
	done

.PHONY: clang
clang:
	@for tool in $(CLANG) $(LLVM_STRIP); do \
		command -v $$tool >/dev/null || { echo "no $$tool, which the generated files are made with: apt-get install $(CLANG) llvm-19 libbpf-dev" >&2; exit 1; }; \
	done

.PHONY: install
install: build ## Install the binary and the systemd unit below DESTDIR, PREFIX
	install -D -m 755 bin/hostflame '$(DESTDIR)$(PREFIX)/bin/hostflame'
	install -d '$(DESTDIR)$(UNITDIR)'
	sed 's|/usr/local/bin/|$(PREFIX)/bin/|' deploy/hostflame.service > '$(DESTDIR)$(UNITDIR)/hostflame.service'

.PHONY: clean
clean: ## Remove what build made
	rm -rf bin
