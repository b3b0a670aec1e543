# The commands of every day. Each is one line that can be typed by hand as well.
.PHONY: run test e2e bench demo

# The cache with its defaults: [::]:8080 for clients, 127.0.0.1:8081 for /metrics.
run:
	cargo run --release

test:
	cargo test --workspace

# Real clients and registries, on Debian as root. CLIENTS="skopeo podman" runs only these.
e2e:
	cargo build --release
	e2e/run $(CLIENTS)

# Comparisons take minutes and a quiet machine: this only says how to start them.
bench:
	@if [ -d bench ]; then \
	  echo "side-by-side runs are in bench/:"; ls bench; \
	  if [ -x bench/run ]; then echo "start them with bench/run on a quiet machine"; fi; \
	else \
	  echo "no bench/ in this checkout"; \
	fi

# The README's demonstration, played by itself against a registry on loopback.
demo:
	cargo build --release
	e2e/demo
