#!/usr/bin/env bash
# containerd pulls through three shapes of hosts.toml, one for each upstream's name, with a new root for every pull.
SUITE=containerd
. "$(dirname "$0")/../lib.sh"
client_home
stop_on_exit

image() { echo "$1.test/$REPO:v1"; } # KIND
pulled_digest() { ctr_cli images ls "name==$(image "$1")" | awk 'NR == 2 { print $3 }'; }

pulled() { # cold|warm KIND SHAPE WHAT
  check "$3: containerd starts, empty" containerd_start || return
  check "$3: $4" ctr_pull "$(image "$2")" &&
    same "$3: $1 digest is the upstream's" "$(pulled_digest "$2")" "$(index_digest v1)"
  containerd_stop
}

each() { # cold|warm WHAT
  pulled "$1" anon "?ns=" "$2"
  pulled "$1" token "/v2/<key>, override_path" "$2"
  pulled "$1" redirect "/<key>, no override" "$2"
  pulled "$1" basic "?ns=, basic" "$2"
}

containerd_hosts anon.test "http://$CACHE"
containerd_hosts token.test "http://$CACHE/v2/token.test" "override_path = true"
containerd_hosts redirect.test "http://$CACHE/redirect.test"
containerd_hosts basic.test "http://$CACHE"

cache_start
upstream_start $KINDS
each cold "cold pull"
upstream_stop $KINDS
each warm "warm pull into an empty store, upstream stopped"
check_store "after all" v1 "$(own_arch)"
exit 0
