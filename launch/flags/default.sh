# shellcheck shell=bash
# Sourced by the flag files: what is set already is never changed.

# Adds the flag $2 (--NAME=VALUE) to the variable named $1, unless NAME is there already.
default_flag() {
  local -n flags="$1"
  local words=" ${flags:-} "
  words="${words//[$'\t\n']/ }"
  # XLA takes a value without a leading dash for the name of a file of flags, which is the user's own.
  [[ "$words" =~ ^\ *$ || "$words" =~ ^\ *- ]] || return 0
  case "$words" in
    *" ${2%%=*}="* | *" ${2%%=*} "*) ;;
    *) flags="${flags:+$flags }$2" ;;
  esac
  export "${1?}"
}

# Sets the variable $1 to $2 and exports it, unless it is set already, be it to nothing.
default_variable() {
  [[ -v "$1" ]] || export "$1=$2"
}
