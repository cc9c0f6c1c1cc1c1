#!/usr/bin/env bash
# Builds libraries.js anew from pinned packages; needs npm and its registry. Users need neither.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp "$here/entry.js" "$folder"
cd "$folder"
npm init --yes >/dev/null
npm install --silent --no-audit --no-fund three@0.180.0 @sparkjsdev/spark@2.2.0 esbuild@0.28.2
npx esbuild entry.js --bundle --minify --format=iife --global-name=libraries --target=es2022 \
    --legal-comments=none --banner:js='/* three.js 0.180.0, Spark 2.2.0; see LICENSES.txt */' \
    --outfile="$here/libraries.js"
{
    printf 'libraries.js holds parts of the following, as build.sh puts them together.\n'
    for package in three @sparkjsdev/spark fflate; do  # Spark brings fflate
        printf '\n---- %s ----\n\n' "$package"
        cat "node_modules/$package/LICENSE"
    done
} >"$here/LICENSES.txt"
