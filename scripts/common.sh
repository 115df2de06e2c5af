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
# Arguments for cargo: the packages of the modules, and those that only tests load, the modules with failpoints and a balancing
# method.
modules=(--package nginx-consul-upstream --package stream-module)
failpoints=(--package failpoints --package failpoints-stream --package foreign-method
  --features failpoints/failpoints,failpoints-stream/failpoints)
if [ -n "${NGINX_SOURCE_DIR:-}${NGINX_BUILD_DIR:-}" ]; then
  cargo_flags+=(--no-default-features)
  # Of an nginx without stream there is one module.
  if ! grep -qs 'define NGX_STREAM_UPSTREAM_ZONE' "${NGINX_BUILD_DIR:-$NGINX_SOURCE_DIR/objs}/ngx_auto_config.h"; then
    modules=(--package nginx-consul-upstream)
    failpoints=(--package failpoints --package foreign-method --features failpoints/failpoints)
  fi
fi

# Sets `network` to the beginning of a command line that runs the rest in a network of its own, with nothing but the loopback;
# to nothing where that is not permitted. On a machine with Docker or a firewall the kernel remembers each connection for two
# minutes, and large tests fill its table: it drops packets then.
own_network() {
  network=()
  if unshare --net -- ip link set lo up 2>/dev/null; then
    # shellcheck disable=SC2016 # for the shell in there
    network=(unshare --net -- sh -c 'ip link set lo up && exec "$@"' sh)
  fi
}

# The directory with `times`, a line of seconds and name for each part that has run, and `tests.log`, the output of the tests.
parts=$target/parts

forget_parts() {
  rm -rf "$parts"
  mkdir -p "$parts"
}

note_part() { # NAME SECONDS [LOG]
  mkdir -p "$parts"
  printf '%d\t%s\n' "$2" "$1" >>"$parts/times"
  if [ -n "${3:-}" ]; then cat "$3" >>"$parts/tests.log"; fi
}

# How long each part took that was noted, and the ten slowest tests.
tell_parts() {
  [ -s "$parts/times" ] || return 0
  printf '\nTimes, in minutes and seconds:\n\n'
  # A part of less than a second is not worth a line.
  awk -F '\t' '$1 > 0 { printf "%6d:%02d  %s\n", $1 / 60, $1 % 60, $2 }' "$parts/times"
  [ -s "$parts/tests.log" ] || return 0
  printf '\nThe slowest tests, in seconds:\n\n'
  sed -nE 's/^test ([^ ]+) .*<([0-9.]+)s>$/\2 \1/p' "$parts/tests.log" | sort -rn |
    awk 'NR <= 10 { printf "%9.1f  %s\n", $1, $2 }'
}

# Runs the tests of a part: scripts/test-runner knows which. T=NAME selects tests by their names.
cargo_test() { # PART ARGUMENT…
  PART=$1 BOUND=${BOUND:-10m} cargo test --config "target.'cfg(all())'.runner = ['$root/scripts/test-runner']" \
    "${@:2}" --no-fail-fast -- ${T:+"$T"}
}
