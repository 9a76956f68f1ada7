#!/usr/bin/env bash
#
# Two hosts, fyst and koln, with a long link between them: 240 ms, 1 Gbit/s. Runs a command or a shell on one of them, and
# removes both at its end. koln has an ssh server, and `ssh koln` works on fyst.
#
#   scripts/longlink.sh [OPTION…] [fyst|koln] [COMMAND…]     --help lists the options
#   scripts/longlink.sh --in DIRECTORY koln [COMMAND…]       the other host of a link that runs already
#
#   scripts/longlink.sh --delay 60ms --loss 0.1% fyst ssh koln hostname
#
# In a shell of a host, `long-link set delay=5ms`, `cut`, `mend`, `show` and `reboot koln --after 30s` change the link.
# Needs root and /dev/net/tun; without them its exit code is 77. See docs/development/long-link.md.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib/services.sh
. "$here/scripts/lib/services.sh"

need_compiler
cd "$here"
cargo build --locked --quiet -p long-link
if ((EUID == 0)); then (run_begin && install_for ip=iproute2 sshd=openssh-server ssh=openssh-client >&2); fi
program=$(target_dir)/debug/long-link
PATH=$(dirname "$program"):$PATH
if [[ ${1:-} == --in ]]; then
  (($# >= 3)) || die "no host is given" "Usage: scripts/longlink.sh --in DIRECTORY fyst|koln [COMMAND…]"
  exec "$program" on "$@"
fi
if (($# == 0)); then set -- fyst; fi
exec "$program" run "$@"
