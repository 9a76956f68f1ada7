# shellcheck shell=bash
#
# Sites and routes for `ccat-transfer db seed`. Source it.

# site SHORT_NAME NAME PLACE PATH [HOST] : a site with a buffer. Without a host it is on this one.
site() {
  printf '[[sites]]\nshort_name = "%s"\nname = "%s"\nlocation = "%s"\n' "$1" "$2" "$3"
  location buffer 1 "$4" "${5:-}"
}

# location NAME PRIORITY PATH [HOST] : a further location of the last site.
location() {
  printf '[[sites.locations]]\nname = "%s"\ntype = "buffer"\nstorage = "disk"\n' "$1"
  printf 'priority = %s\npath = "%s"\nhost = "%s"\n\n' "$2" "$3" "${4:-}"
}

# route ORIGIN DESTINATION : by bbcp, direct.
route() {
  printf '[[routes]]\norigin = "%s"\ndestination = "%s"\nmethod = "bbcp"\ntype = "direct"\n' "$1" "$2"
}

# two_sites CCAT_PATH COLOGNE_PATH [COLOGNE_HOST] : the sites of the demo and of the doctor's picture.
two_sites() {
  site ccat "CCAT observatory" "Cerro Chajnantor, Chile" "$1"
  site cologne "University of Cologne" "Cologne, Germany" "$2" "${3:-}"
  route ccat cologne
}
