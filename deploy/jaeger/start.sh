#!/usr/bin/env bash
# `make jaeger`: Jaeger with our configuration on 127.0.0.1, from a `jaeger` on the PATH or else with Docker.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
image="${JAEGER_IMAGE:-jaegertracing/jaeger:2.20.0}"

ready() {
  echo "==> Jaeger: http://127.0.0.1:16686 (Ctrl-C ends it). Send spans with"
  echo "    OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=http://127.0.0.1:4317 tensorspan serve MODEL"
}

if command -v jaeger >/dev/null; then
  ready
  export TENSORSPAN_JAEGER_UI="$here/ui.json" JAEGER_LISTEN_HOST=127.0.0.1
  exec jaeger --config "$here/config.yaml"
fi
if ! command -v docker >/dev/null; then
  echo "tensorspan: neither jaeger nor docker is on the PATH; repair: install Docker, or put the binary of" \
    "https://github.com/jaegertracing/jaeger/releases on the PATH" >&2
  exit 1
fi
if ! problem="$(docker info 2>&1 >/dev/null)"; then
  echo "tensorspan: Docker does not answer (${problem%%$'\n'*}); repair: start its daemon (sudo systemctl start docker)" >&2
  exit 1
fi
ready
# Inside it listens on every interface of the container; outside only loopback is published.
exec docker run --rm --name tensorspan-jaeger \
  --publish 127.0.0.1:16686:16686 --publish 127.0.0.1:4317:4317 --publish 127.0.0.1:4318:4318 \
  --env JAEGER_LISTEN_HOST=0.0.0.0 --env TENSORSPAN_JAEGER_UI=/etc/tensorspan/ui.json \
  --volume "$here:/etc/tensorspan:ro" "$image" --config /etc/tensorspan/config.yaml
