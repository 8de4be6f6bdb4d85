#!/usr/bin/env bash
# Makes the virtual environment .venv in the repository's root, or finds it fit and does nothing. It installs
# what requirements/cpu.txt pins, Transformer Engine's Python code for the tests, and this checkout (editable); it touches
# nothing outside the repository.
#
#   tools/environment.sh            PYTHON=/path/to/python3.12 tools/environment.sh
#   SEMION_REQUIREMENTS=cpu_py312 tools/environment.sh      another one beside it, .venv_cpu_py312, of requirements/cpu_py312.txt
#
# Needs Python 3.11 or 3.12 (cpu_py312: 3.12), pip and a C++ compiler. A stamp, written last, tells a whole environment from an
# interrupted or outdated one; a lock lets several callers ask at once.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
requirements=${SEMION_REQUIREMENTS:-cpu}
venv=$root/.venv${SEMION_REQUIREMENTS:+_$SEMION_REQUIREMENTS}
cd "$root"
te=$(grep '^transformer_engine==' requirements/gpu.txt)

say() { printf 'environment: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

case $requirements in
  cpu) pythons="python3 python3.12 python3.11" versions="3.11 or 3.12" gigabytes=2.5 ;;
  cpu_py312) pythons=python3.12 versions=3.12 gigabytes=5.5 ;;
  *) fail "SEMION_REQUIREMENTS must be cpu or cpu_py312; found '$requirements': name one, or unset it" ;;
esac

# Digests of what the two installations depend on. The root counts: a virtual environment cannot be moved.
packages_digest() {
  { echo "$root" "$te"; cat requirements/common.txt requirements/docs.txt requirements/tracking.txt "requirements/$requirements.txt"; } | sha256sum | cut -d' ' -f1
}
engine_digest() {
  { cat setup.py; [ ! -d csrc ] || find csrc -type f -exec sha256sum {} + | LC_ALL=C sort; } | sha256sum | cut -d' ' -f1
}
fresh() { [ -x "$venv/bin/python" ] && [ "$(cat "$venv/$1.stamp" 2>/dev/null)" = "$2" ]; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-$pythons}; do
    if "$candidate" -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] not in sys.argv[1].split())' "$versions" 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail "Python must be $versions; found $(${PYTHON:-python3} --version 2>&1): install one, or name it in PYTHON"
}

pip_install() { "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input --no-deps "$@"; }

install_packages() {
  local python torch
  python=$(find_python)
  command -v "${CXX:-c++}" >/dev/null || fail "a C++ compiler must be in PATH; found no ${CXX:-c++}: install g++ or set CXX"
  say "making ${venv##*/} with $("$python" --version); packages take $gigabytes GB and some 2 to 4 minutes"
  # Where the system's Python comes without ensurepip, its own pip fills the environment.
  "$python" -m venv --clear "$venv" 2>/dev/null || {
    "$python" -m venv --clear --without-pip "$venv"
    "$python" -m pip --python "$venv/bin/python" install -qq pip
  }
  torch=$(grep '^torch==' "requirements/$requirements.txt")
  say "installing $torch"
  pip_install "$torch" || {
    say "pip's own index has no $torch: trying PyTorch's CPU index"
    pip_install --extra-index-url https://download.pytorch.org/whl/cpu "$torch" ||
      fail "$torch must be on an index; found it on none: check the network and pip's configuration, then run this again"
  }
  say "installing the other packages"
  pip_install -r "requirements/$requirements.txt" || fail "pip failed, as said above: mend that, then run this again"
  # Its Python code alone, for the tests, and beside the environment: megatron-core would use it wherever it can import it.
  pip_install --target "$venv/transformer_engine" "$te" || fail "pip failed, as said above: mend that, then run this again"
}

install_engine() {
  say "installing semion from this checkout"
  pip_install --no-build-isolation -e .
}

packages=$(packages_digest)
engine=$(engine_digest)
fresh packages "$packages" && fresh engine "$engine" && exit 0
command -v flock >/dev/null || fail "flock must be in PATH; found none: install util-linux"
exec 9>"$root/.venv.lock"
flock --nonblock 9 || { say "another process is making .venv: waiting for it"; flock 9; }
if ! fresh packages "$packages"; then
  rm -f "$venv"/*.stamp
  install_packages
  echo "$packages" >"$venv/packages.stamp"
fi
if ! fresh engine "$engine"; then
  install_engine
  echo "$engine" >"$venv/engine.stamp"
fi
say "ready in $SECONDS s"
