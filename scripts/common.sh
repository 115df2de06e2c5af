# shellcheck shell=bash disable=SC2034
# What the scripts beside this file share; each begins with `. "$(dirname "$0")/common.sh"`.
set -euo pipefail

# Absolute, because build scripts run in directories of their own.
for dir in NGINX_SOURCE_DIR NGINX_BUILD_DIR; do
  if [ -n "${!dir:-}" ]; then export "$dir=$(realpath "${!dir}")"; else unset "$dir"; fi
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
# Tools that take minutes to build are kept outside of the clone, so that the next clone finds them.
tools=${XDG_CACHE_HOME:-$HOME/.cache}/nginx-consul-upstream/tools
name=${0##*/}
cd "$root"

# The make that runs these scripts is none of the business of the make that builds nginx.
unset MAKEFLAGS MFLAGS MAKEOVERRIDES MAKELEVEL

say() { printf '%s: %s\n' "$name" "$*" >&2; }
die() { say "$*"; exit 1; }

# The flags of every cargo command that builds the modules: nginx is the one of the crate nginx-src, or one's own.
cargo_flags=(--release --locked)
# What cargo is told to build: the modules, and those with failpoints, which some tests load.
modules=(--package nginx-consul-upstream --package stream-module)
failpoints=(--package failpoints --package failpoints-stream
  --features failpoints/failpoints,failpoints-stream/failpoints)
if [ -n "${NGINX_SOURCE_DIR:-}${NGINX_BUILD_DIR:-}" ]; then
  cargo_flags+=(--no-default-features)
  # Of an nginx without stream there is one module.
  if ! grep -qs 'define NGX_STREAM_UPSTREAM_ZONE' "${NGINX_BUILD_DIR:-$NGINX_SOURCE_DIR/objs}/ngx_auto_config.h"; then
    modules=(--package nginx-consul-upstream)
    failpoints=(--package failpoints --features failpoints)
  fi
fi

# Runs a command in a network of its own, with nothing but the loopback, where that can be had. On a machine with Docker or a
# firewall the kernel remembers each connection for two minutes, and large tests fill its table: it drops packets then.
in_own_network() {
  if unshare --net -- ip link set lo up 2>/dev/null; then
    # shellcheck disable=SC2016 # for the shell in there
    unshare --net -- sh -c 'ip link set lo up && exec "$@"' sh "$@"
  else
    "$@"
  fi
}
