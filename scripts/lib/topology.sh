# shellcheck shell=bash
#
# The two sites of the demo and of the doctor's picture. Source it.

# two_sites CCAT_PATH COLOGNE_PATH [COLOGNE_HOST] : for `ccat-transfer db seed`. A site without a host is on this one.
two_sites() {
  cat <<END
[[sites]]
name = "CCAT observatory"
short_name = "ccat"
location = "Cerro Chajnantor, Chile"

[[sites.locations]]
name = "buffer"
type = "buffer"
storage = "disk"
host = ""
path = "$1"
priority = 1

[[sites]]
name = "University of Cologne"
short_name = "cologne"
location = "Cologne, Germany"

[[sites.locations]]
name = "buffer"
type = "buffer"
storage = "disk"
host = "${3:-}"
path = "$2"
priority = 1

[[routes]]
origin = "ccat"
destination = "cologne"
method = "bbcp"
type = "direct"
END
}
