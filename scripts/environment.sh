# Sourced by quickstart and test: finds a Python, makes the virtual environment, installs once.
# PYTHON chooses the interpreter, VENV the folder of the environment (default .venv).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}

say() { printf '%s\n' "$*" >&2; }

# True when a command is a Python that jaxmed supports and that really runs (shims of version managers may not).
supported() {
  "$1" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() {
  if [ -n "${PYTHON:-}" ]; then
    supported "$PYTHON" && { echo "$PYTHON"; return; }
    say "jaxmed: PYTHON: expected Python 3.11, 3.12 or 3.13 that runs, found $PYTHON; name another one"
    return 2
  fi
  local candidate
  for candidate in python3.13 python3.12 python3.11 python3 python; do
    supported "$candidate" && { echo "$candidate"; return; }
  done
  say "jaxmed: python: expected Python 3.11, 3.12 or 3.13, found none that runs; install one, or set PYTHON=/path/to/python"
  return 2
}

# ensure EXTRAS [REQUIREMENTS]: the environment holds jaxmed with these extras, and what the file lists. What
# FILE-nodeps.txt lists beside FILE.txt declares dependencies that it does not need here, and comes without them.
# A stamp of what was asked for makes the second call return at once.
ensure() {
  local extras=$1 requirements=${2:-} alone= python minor wanted stamp began
  if [ -n "$requirements" ] && [ -e "$root/${requirements%.txt}-nodeps.txt" ]; then alone=${requirements%.txt}-nodeps.txt; fi
  if [ ! -x "$venv/bin/python" ] || ! supported "$venv/bin/python"; then
    python=$(find_python) || exit 2
    say "Making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" || { say "jaxmed: venv: expected a Python with venv, found none; install python3-venv"; exit 2; }
  fi
  minor=$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  wanted=$(cat "$root/pyproject.toml" "$root/constraints/python$minor.txt" ${requirements:+"$root/$requirements"} ${alone:+"$root/$alone"} | cksum | tr ' ' -)
  stamp="$venv/installed-$(printf '%s' "${extras:-core}" | tr ',' '-')${requirements:+-$(basename "$requirements" .txt)}-$wanted"
  [ -e "$stamp" ] && return
  say "Installing jaxmed${extras:+ with $extras}${requirements:+ and $requirements} (once, about a minute)"
  began=$SECONDS
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$root/constraints/python$minor.txt" \
    --editable "$root${extras:+[$extras]}" ${requirements:+--requirement "$root/$requirements"} || {
    say "jaxmed: installation: expected pip to finish, found the error above; check the network and try again"
    exit 2
  }
  [ -z "$alone" ] || "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --requirement "$root/$alone" || {
    say "jaxmed: $alone: expected pip to finish, found the error above; check the network and try again"
    exit 2
  }
  touch "$stamp"
  say "Installed in $((SECONDS - began)) s, $(du -sm "$venv" | cut -f1) MB"
}
