#!/usr/bin/env bash
# podman pulls this machine's platform from each of the four upstreams and runs it.
SUITE=podman
. "$(dirname "$0")/../lib.sh"
client_home
stop_on_exit

image() { echo "$CACHE/$1.test/$REPO:v1"; } # KIND
pull() { podman_in "$STORE" pull -q --tls-verify=false "$(image "$1")"; }
repo_digests() { podman_in "$STORE" image inspect --format '{{range .RepoDigests}}{{println .}}{{end}}' "$(image "$1")"; }
has_index_digest() { repo_digests "$1" | grep -F "@$(index_digest v1)"; }
run_in() { podman_in "$1" run --rm --network none "${@:2}"; } # STORE IMAGE COMMAND...

probe() {
  local store
  store=$(new_store)
  probe_layer | podman_in "$store" import - probe:1 && run_in "$store" probe:1 /busybox true
}

pulled() { # cold|warm KIND WHAT
  STORE=$(new_store)
  check "$2: $3" pull "$2" && check "$2: $1 digest is the upstream's" has_index_digest "$2"
}

run_pulled() { # KIND: out of the store of the last pull
  if probe >"$E2E_WORK/probe.log" 2>&1; then
    same "the pulled image runs" "$(run_in "$STORE" "$(image "$1")" 2>&1)" "linux/$(own_arch)"
  else
    skip "run the pulled image: this machine cannot run a container: $(tail -n 1 "$E2E_WORK/probe.log")"
  fi
}

cache_start
upstream_start $KINDS
for kind in $KINDS; do pulled cold "$kind" "cold pull"; done
upstream_stop $KINDS
for kind in $KINDS; do pulled warm "$kind" "warm pull into an empty store, upstream stopped"; done
run_pulled redirect
check_store "after all" v1 "$(own_arch)"
exit 0
