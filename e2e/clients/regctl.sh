#!/usr/bin/env bash
# regctl copies the whole image and lists tags; crane, where it is there, is the strictest reader of HEAD answers.
SUITE=regctl
. "$(dirname "$0")/../lib.sh"
client_home
stop_on_exit

copy_all() { regctl image copy "$CACHE/$1.test/$REPO:v1" "ocidir://$E2E_WORK/$2:v1"; } # KIND FOLDER
image_name() { echo "$CACHE/$1.test/$REPO:v1"; }

cold() { # KIND
  same "$1: digest is the upstream's" "$(regctl image digest "$(image_name "$1")" 2>&1)" "$(index_digest v1)"
  check "$1: cold pull" copy_all "$1" "regctl-cold-$1"
  same "$1: tag ls" "$(regctl tag ls "$CACHE/$1.test/$REPO" 2>&1 | sort | xargs)" "v1 v2"
}

warm() { # KIND
  check "$1: warm pull, upstream stopped" copy_all "$1" "regctl-warm-$1"
  same "$1: warm digest is the upstream's" "$(regctl image digest "ocidir://$E2E_WORK/regctl-warm-$1:v1" 2>&1)" "$(index_digest v1)"
}

with_crane() {
  command -v crane >/dev/null || { skip "crane: not installed"; return; }
  same "crane digest, upstream stopped" "$(crane digest --insecure "$(image_name anon)" 2>&1)" "$(index_digest v1)"
  check "crane pull, upstream stopped" crane pull --insecure --platform "linux/$(own_arch)" "$(image_name anon)" "$E2E_WORK/crane.tar"
  check "crane validate, upstream stopped" crane validate --insecure --remote "$(image_name anon)"
}

command -v regctl >/dev/null || { skip "all: regctl is not installed, it needs Go"; exit 0; }
regctl registry set "$CACHE" --tls disabled --skip-check
cache_start
upstream_start $KINDS
for kind in $KINDS; do cold "$kind"; done
upstream_stop $KINDS
for kind in $KINDS; do warm "$kind"; done
with_crane
check_store "after all" v1 all
exit 0
