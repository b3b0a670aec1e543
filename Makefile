# The commands of every day. Each is one line that can be typed by hand as well.
.PHONY: run test e2e bench demo

# The cache with its defaults: [::]:8080 for clients, 127.0.0.1:8081 for /metrics.
run:
	cargo run --release

test:
	cargo test

# Real clients and registries, on Debian as root. CLIENTS="skopeo podman" runs only these.
e2e:
	cargo build --release
	e2e/run $(CLIENTS)

# Side by side with nginx and docker-registry, on a quiet machine: about twenty minutes. PARTS="storm cold" runs only these.
bench:
	bench/run $(PARTS)

# The README's demonstration, played by itself against a registry on loopback.
demo:
	cargo build --release
	e2e/demo
