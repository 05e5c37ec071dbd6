#!/bin/sh
# A Chromium for the tests of pages: the system's, or one that is installed here. Says why if there is none.
set -u
for name in chromium chromium-browser google-chrome; do
  command -v "$name" >/dev/null 2>&1 && exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  apt-get install -y -qq chromium >/dev/null 2>&1 && exit 0
  apt-get update -qq >/dev/null 2>&1 && apt-get install -y -qq chromium >/dev/null 2>&1 && exit 0
fi
timeout 300 "${1:-python}" -m playwright install chromium >/dev/null 2>&1 && exit 0
echo "no Chromium could be installed: the tests of pages will be skipped"
