#!/usr/bin/env bash
# Generates the JSON schema that the dashboards are checked against, from Grafana's published types.
# For maintainers, after changing Grafana's version or the panel types in use. Needs node and npm.
# Usage: docker/grafana/schema.sh [OUTPUT]

set -euo pipefail

here=$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")" && pwd)
output=${1:-$here/../../tests/services/grafana_dashboard.schema.json}
grafana=11.6.4

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cp "$here/schema.ts" "$work/"
cat >"$work/package.json" <<'END'
{ "private": true }
END
cat >"$work/tsconfig.json" <<'END'
{ "compilerOptions": { "strict": true, "skipLibCheck": true, "module": "es2020", "moduleResolution": "node" }, "files": ["schema.ts"] }
END
(
  cd "$work"
  npm install --silent --no-audit --no-fund "@grafana/schema@$grafana" ts-json-schema-generator@2.4.0 typescript@5.7.3
  npx tsc --noEmit --project tsconfig.json
  npx ts-json-schema-generator --path schema.ts --tsconfig tsconfig.json --type Dashboard --out schema.json
  # shellcheck disable=SC2016 # JavaScript's own dollars
  GRAFANA=$grafana node --input-type=module --eval '
    import { readFileSync, writeFileSync } from "node:fs";
    const withoutWords = (key, value) => (["description", "deprecated"].includes(key) && typeof value !== "object" ? undefined : value);
    const schema = JSON.parse(readFileSync("schema.json", "utf8"));
    const origin = `Made by docker/grafana/schema.sh from the types of @grafana/schema ${process.env.GRAFANA}. Copyright Grafana Labs, Apache-2.0.`;
    writeFileSync("compact.json", JSON.stringify({ $comment: origin, ...schema }, withoutWords) + "\n");
  '
)
cp "$work/compact.json" "$output"
