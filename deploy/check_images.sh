#!/usr/bin/env bash
# Asks the registries whether every pinned digest is still what its tag names.
# Needs docker with buildx, and a way to the registries. Prints one line an image; a tag that has
# moved since is told with its new digest, and the exit status is then 1.
set -euo pipefail
cd "$(dirname "$0")/.."

status=0
while read -r pinned; do
  tag="${pinned%@*}"
  digest="${pinned#*@}"
  now="$(docker buildx imagetools inspect "$tag" --format '{{.Manifest.Digest}}')"
  if [ "$now" = "$digest" ]; then
    echo "same   $tag"
  else
    echo "moved  $tag  pinned $digest  now $now"
    status=1
  fi
done < <(grep -hoE '[a-z0-9./-]+:[A-Za-z0-9._-]+@sha256:[0-9a-f]{64}' docker-compose.yml server/Dockerfile)
exit "$status"
