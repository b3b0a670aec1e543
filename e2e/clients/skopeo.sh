#!/usr/bin/env bash
# skopeo copies the whole two-platform image out of each of the four upstreams.
SUITE=skopeo
. "$(dirname "$0")/../lib.sh"
client_home
stop_on_exit

copy_all() { # KIND TAG FOLDER
  skopeo copy -q --all --src-tls-verify=false "docker://$CACHE/$1.test/$REPO:$2" "dir:$E2E_WORK/$3"
}
inspect_raw() { skopeo inspect --raw --tls-verify=false "docker://$CACHE/$1.test/$REPO$2"; } # KIND :TAG|@DIGEST
digest_of() { echo "sha256:$(sha256sum | cut -d ' ' -f 1)"; }

# The largest number of times that the upstream sent any one blob, in the log's lines after FROM.
most_gets() { # KIND FROM
  tail -n "+$(($2 + 1))" "$(upstream_log "$1")" | grep -oE 'GET /v2/[^ ]*/blobs/[^ ]+ HTTP/1.[01]" 20[06]' | sort | uniq -c | sort -rn |
    awk 'NR == 1 { most = $1 } END { print most + 0 }'
}
log_length() { wc -l <"$1"; }

cold() { # KIND
  local log from
  log=$(upstream_log "$1")
  from=$(log_length "$log")
  check "$1: cold pull" copy_all "$1" v1 "skopeo-cold-$1"
  same "$1: digest is the upstream's" "$(digest_of <"$E2E_WORK/skopeo-cold-$1/manifest.json")" "$(index_digest v1)"
  same "$1: no blob was fetched twice" "$(most_gets "$1" "$from")" 1
}

# Tokens live for $TOKEN_LIFE s: the second image needs another one.
token_expiry() {
  local before after
  before=$(grep -c "^token $UPSTREAM_USER" "$E2E_WORK/auth.log")
  sleep "$((TOKEN_LIFE + 1))"
  check "token: cold pull of v2 after the token expired" copy_all token v2 skopeo-expiry
  after=$(grep -c "^token $UPSTREAM_USER" "$E2E_WORK/auth.log")
  if [ "$after" -gt "$before" ]; then ok "token: a new token was fetched"; else fail "token: a new token was fetched"; fi
}

warm() { # KIND
  check "$1: warm pull, upstream stopped" copy_all "$1" v1 "skopeo-warm-$1"
  same "$1: warm digest is the upstream's" "$(digest_of <"$E2E_WORK/skopeo-warm-$1/manifest.json")" "$(index_digest v1)"
  same "$1: by digest, upstream stopped" "$(inspect_raw "$1" "@$(index_digest v1)" | digest_of)" "$(index_digest v1)"
}

cache_status() { # KIND PATH
  curl -sI "http://$CACHE/v2/$1.test/$REPO/$2" | tr -d '\r' | sed -n 's/^cache-status: //Ip'
}

cache_start
upstream_start $KINDS
for kind in $KINDS; do cold "$kind"; done
token_expiry
same "tags" "$(skopeo list-tags --tls-verify=false "docker://$CACHE/anon.test/$REPO" | jq -c '.Tags | sort')" '["v1","v2"]'
upstream_stop $KINDS
for kind in $KINDS; do warm "$kind"; done
same "anon: a layer's Cache-Status" "$(cache_status anon "blobs/$(digests v1 all | tail -n 1)")" "oci-remote-cache; hit"
same "anon: Cache-Status of a tag inside tag_ttl" "$(cache_status anon manifests/v1)" "oci-remote-cache; hit"
same "redirect: Cache-Status of a tag past tag_ttl" "$(cache_status redirect manifests/v1 | cut -d ';' -f 1,2)" \
  "oci-remote-cache; fwd=stale"
check_store "after all" v1 all
check_store "after all, v2" v2 all
exit 0
