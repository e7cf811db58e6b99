# Sourced by the commands beside it: gives the checkout its own environment, and says where that is.
#
#   before   $self   the path of the command, symbolic links followed
#   after    $root   the checkout
#            $env    the environment, $root/.venv or, when $version is set (3.13), $root/.venv-3.13
#
# PYTHON names the interpreter to use. PREFORK_VENV names an environment that is ready: nothing is installed.

version=
root=$(CDPATH= cd -- "$(dirname -- "$self")/.." && pwd -P) || exit 1
unset PYTHONHOME

die() {
    printf '%s: %s\n' "${self##*/}" "$*" >&2
    exit 1
}

# need EXTRAS ARGUMENT...: returns when $env has the project with these extras (one word, by spaces). When something
# is to be installed, _env.py takes this process over, and starts the command again with its arguments afterwards:
# there is one process at all times, so a signal always finds the one that works.
need() {
    if [ -n "${PREFORK_VENV:-}" ]; then
        env=$PREFORK_VENV
        [ -x "$env/bin/python" ] || die "PREFORK_VENV=$env is not an environment: it has no bin/python"
        return
    fi
    env=$root/.venv${version:+-$version}
    # Images often forbid Python to keep bytecode: each of the tests' processes would compile all sources anew, a third
    # of its start.
    unset PYTHONDONTWRITEBYTECODE
    export PYTHONPYCACHEPREFIX="$env/bytecode"
    key=
    for file in "$root"/pyproject.toml "$root"/prefork/worker/*.[ch]; do
        key="$key$(cksum <"$file") " || exit 1
    done
    key=$key$root
    ready "$1" && return
    find_python
    extras=$1
    shift
    exec "$python" -I "$root/bin/_env.py" "$env" "$root" "$key" "${PYTHON:-}" "$extras" "$self" "$@"
}

# ready EXTRAS: whether a finished installation is there, and what it was made from has not changed since.
ready() {
    [ -x "$env/bin/python" ] && [ -r "$env/ready" ] || return 1
    { IFS= read -r made_from && IFS= read -r made_by && IFS= read -r asked && IFS= read -r has; } <"$env/ready" || return 1
    [ "$made_from" = "$key" ] || return 1
    [ -z "${PYTHON:-}" ] || [ "$asked" = "$PYTHON" ] || return 1
    [ "$("$env/bin/python" -ISc 'import sys; print("%d.%d" % sys.version_info[:2])' 2>&1)" = "$made_by" ] || return 1
    for extra in $1; do
        case " $has " in *" $extra "*) ;; *) return 1 ;; esac
    done
}

# Sets $python. Each candidate is run to find out: a name on the PATH may be a shim with nothing behind it, and some
# systems ship Python without the means to make an environment.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        python=$PYTHON
        usable || die "PYTHON=$PYTHON does not run, is older than 3.11, or lacks the modules venv and ensurepip"
        return
    fi
    if [ -n "$version" ]; then
        for python in "python$version" "${HOME:-}/.pyenv/versions/$version".*/bin/python3; do
            usable && return
        done
        die "no Python $version (with venv and ensurepip) on the PATH or in ~/.pyenv/versions"
    fi
    for python in python3.13 python3.12 python3.11 python3; do
        usable && return
    done
    die "no Python >= 3.11 (with venv and ensurepip) on the PATH; install one, or name one by PYTHON=/path/to/python3"
}

usable() {
    "$python" -ISc 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}
