"""Checks OCSF events, one a line of a file, by the published schema as
`ocsf-json-schema` carries it."""

import json
import sys

import jsonschema
from ocsf_json_schema import OcsfJsonSchemaEmbedded, get_ocsf_schema

wrong, seen, schemas = [], 0, {}
ocsf = OcsfJsonSchemaEmbedded(get_ocsf_schema(version="1.5.0"))
for line in open(sys.argv[1]):
    event = json.loads(line)
    profiles = event["metadata"].get("profiles", [])
    key = (event["class_uid"], *profiles)
    if key not in schemas:
        name = ocsf.lookup_class_name_from_uid(event["class_uid"])
        schemas[key] = jsonschema.Draft202012Validator(ocsf.get_class_schema(name, profiles))
    seen += 1
    for error in schemas[key].iter_errors(event):
        wrong.append(f"{event['metadata']['event_code']} {error.json_path}: {error.message[:200]}")
print(json.dumps({"seen": seen, "wrong": sorted(set(wrong))}))
