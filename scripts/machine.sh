# Sourced by ./check: installs what the tests need from the machine, if it runs as root on Debian.
# Elsewhere it says what is missing, and the tests that need it fail with the same message.

install_package() { # install_package PACKAGE WHAT-FOR
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "Installing $1 ($2)"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$1"; } \
      >/dev/null 2>&1 && return
  fi
  echo "MISSING: $1 ($2). Install it, or run ./check as root on Debian." >&2
}

need_postgres() {
  ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null ||
    install_package postgresql "the tests marked postgres"
}

need_chromium() {
  [ -x "${CHROMIUM:-/usr/bin/chromium}" ] || install_package chromium "the tests marked browser"
}

need_nginx() {
  command -v nginx >/dev/null || [ -x /usr/sbin/nginx ] ||
    install_package nginx-light "the test of docker/nginx.conf"
}
