#!/usr/bin/env bash
# Prints the home of a Java that can run Spark, from JAVA_HOME, PATH, or the folders of macOS and
# Homebrew. If there is none, and the user is root on Debian or Ubuntu, installs a headless JRE.
set -euo pipefail

# Spark 4 needs Java 17, and a module that trimmed JREs lack.
home_if_usable() {
    local properties version
    properties="$("$1" --add-modules jdk.incubator.vector -XshowSettings:properties -version 2>&1)" ||
        return 1
    version="$(sed -n 's/^ *java\.specification\.version = //p' <<<"$properties")"
    [ "${version%%.*}" -ge 17 ] 2>/dev/null || return 1
    sed -n 's/^ *java\.home = //p' <<<"$properties"
}

candidates() {
    [ -z "${JAVA_HOME:-}" ] || echo "$JAVA_HOME/bin/java"
    command -v java || true
    if [ "$(uname)" = Darwin ]; then
        echo "$(/usr/libexec/java_home -v 17+ 2>/dev/null)/bin/java"
        ! command -v brew >/dev/null || ls -d "$(brew --prefix)"/opt/openjdk*/bin/java 2>/dev/null
    fi
}

find_java() {
    local java
    while read -r java; do
        home_if_usable "$java" && return
    done < <(candidates)
    return 1
}

install_java() {
    export DEBIAN_FRONTEND=noninteractive
    echo "setup: installing a headless Java with apt-get" >&2
    apt-get update -qq
    for package in openjdk-17-jre-headless openjdk-21-jre-headless default-jre-headless; do
        ! apt-get install -y -qq --no-install-recommends "$package" || return 0
    done
}

find_java && exit
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    install_java >/dev/null
    find_java && exit
fi
echo "setup: Spark needs Java 17 or newer. Install a JRE (Debian and Ubuntu:" \
    "openjdk-17-jre-headless, macOS: brew install openjdk@17) or set JAVA_HOME." >&2
exit 1
