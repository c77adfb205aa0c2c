# Sourced by slurm, jobset and tpu-vm: their options in common, and starting again what failed.

say() { printf '%s\n' "$*" >&2; }

# refuse FIELD EXPECTED FOUND ADVICE: a mistake in one line, as jaxmed itself says it.
refuse() {
  say "jaxmed: $1: expected $2, found $3; $4"
  exit 2
}

# The lines of a script's head, without the first, are its help.
help_of() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1"; }

# value OPTION [VALUE]: print the value of an option.
value() {
  [ $# -ge 2 ] || refuse "$1" "a value" "nothing" "see $(basename "$0") --help"
  printf '%s' "$2"
}

# whole OPTION VALUE: refuse what is no whole number of 0 or more.
whole() {
  case $2 in
    '' | *[!0-9]*) refuse "$1" "a whole number of 0 or more" "${2:-nothing}" "see $(basename "$0") --help" ;;
  esac
}

# check_command WORD...: what a launcher may start again by itself.
check_command() {
  local word has_out=
  [ $# -ge 2 ] || refuse "command" "-- SYSTEM STAGE ... --out RUN at the end" "${*:-nothing}" "see $(basename "$0") --help"
  for word in "$@"; do
    case $word in
      --out | --out=*) has_out=yes ;;
      --overwrite | --no-resume)
        refuse "$word" "a command that goes on where it was" "one that begins anew at every start" \
          "delete the old run, or choose another --out" ;;
      --mesh.distributed | --mesh.coordinator* | --mesh.process | --mesh.process=* | --mesh.processes*)
        refuse "$word" "no option that joins processes" "one that this script sets" "leave it out" ;;
    esac
  done
  [ -n "$has_out" ] || refuse "--out" "a run folder that every node sees" "nothing" "add --out RUN"
}

# quoted WORD...: the words as a shell reads them back.
quoted() {
  local text
  printf -v text '%q ' "$@"
  printf '%s' "${text% }"
}

# again TIMES SECONDS COMMAND...: run a command, and at most TIMES more after a failure, each time from its last save.
# Exit code 2 is a mistake of the user's, which no repetition mends; 130 and 143 say that it was told to stop.
again() {
  local left=$1 pause=$2 code
  shift 2
  while :; do
    code=0
    "$@" || code=$?
    case $code in
      0) return 0 ;;
      2)
        echo "jaxmed: exit code 2: the line above says what to change; not started again" >&2
        return 2 ;;
      130 | 143)
        echo "jaxmed: exit code $code: it was told to stop, and has saved; not started again here" >&2
        return "$code" ;;
    esac
    if [ "$left" -le 0 ]; then
      echo "jaxmed: exit code $code: no start is left (--retries)" >&2
      return "$code"
    fi
    left=$((left - 1))
    echo "jaxmed: exit code $code: starting again from the last save in $pause s; $left more after that" >&2
    sleep "$pause"
  done
}
