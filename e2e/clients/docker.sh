#!/usr/bin/env bash
# dockerd pulls through the cache as its registry-mirror, and by the cache's own name; a new data-root for every pull.
SUITE=docker
. "$(dirname "$0")/../lib.sh"
client_home
stop_on_exit

probe() { probe_layer | docker_cli import - probe:1 && docker_cli run --rm --network none probe:1 /busybox true; }
has_index_digest() { docker_cli image inspect --format '{{join .RepoDigests "\n"}}' "$1" | grep -F "@$(index_digest v1)"; }

run_pulled() { # IMAGE
  if probe >"$E2E_WORK/probe.log" 2>&1; then
    same "$label: the pulled image runs" "$(docker_cli run --rm --network none "$1" 2>&1)" "linux/$(own_arch)"
  else
    skip "$label: run the pulled image: this machine cannot run a container: $(tail -n 1 "$E2E_WORK/probe.log")"
  fi
}

pulled() { # cold|warm IMAGE MIRROR WHAT
  check "$label: dockerd starts, empty" dockerd_start "$3" || return
  check "$label: $4" docker_cli pull -q "$2" &&
    check "$label: $1 digest is the upstream's" has_index_digest "$2"
  [ "$1" = cold ] || run_pulled "$2"
  dockerd_stop
}

round() { # LABEL KIND IMAGE [MIRROR]: a cache, an upstream and two daemons of its own
  label=$1
  cache_start
  upstream_start "$2"
  pulled cold "$3" "${4:-}" "cold pull"
  upstream_stop "$2"
  pulled warm "$3" "${4:-}" "warm pull into an empty store, upstream stopped"
  check_store "$label" v1 "$(own_arch)"
  cache_stop
}

round mirror anon "${LIBRARY_REPO#library/}:v1" "http://$CACHE"
round direct anon "$CACHE/anon.test/$REPO:v1"
round direct-token token "$CACHE/token.test/$REPO:v1"
exit 0
