"""Reads a Parquet and an Arrow file and compares them with the lines they are of.

usage: compare.py PACKAGES LINES PARQUET ARROW
"""

import json
import sys
from datetime import datetime, timezone

sys.path.insert(0, sys.argv[1])

import pyarrow as pa  # noqa: E402
import pyarrow.feather as feather  # noqa: E402
import pyarrow.parquet as parquet  # noqa: E402

# Column: where it stands in a record.
NUMBERS = {
    "seq": "seq", "duration_ms": "durationMs", "status": "status", "policy_rule": "policy.rule",
    "bytes_sent": "bytes.sent", "bytes_received": "bytes.received", "connection": "connection",
}
TEXTS = {
    "node": "node", "kind": "kind", "verdict": "verdict", "transport": "transport",
    "source_identity": "source.identity", "source_pod": "source.pod",
    "destination_address": "destination.address", "destination_workload": "destination.workload",
    "method": "method", "path": "path", "policy_name": "policy.name", "end": "end",
}
TIMES = {"time": "time", "started": "started"}


def at(record, path):
    for name in path.split("."):
        record = record.get(name) if isinstance(record, dict) else None
    return record


def instant(text):
    """To the microsecond, downwards."""
    if text is None:
        return None
    whole, _, fraction = text.rstrip("Z").partition(".")
    micros = int((fraction + "000000")[:6])
    moment = datetime.fromisoformat(whole).replace(tzinfo=timezone.utc)
    return moment.replace(microsecond=micros)


def compare(name, table, records, lines):
    types = {field.name: field.type for field in table.schema}
    for column in NUMBERS:
        assert types[column] == pa.uint64(), (name, column, types[column])
    for column in TEXTS:
        assert types[column] == pa.string(), (name, column, types[column])
    for column in TIMES:
        assert types[column] == pa.timestamp("us", tz="UTC"), (name, column, types[column])
    for column, path in {**NUMBERS, **TEXTS}.items():
        assert table[column].to_pylist() == [at(r, path) for r in records], (name, column)
    for column, path in TIMES.items():
        assert table[column].to_pylist() == [instant(at(r, path)) for r in records], (name, column)
    assert table["record"].to_pylist() == lines, name


def main():
    with open(sys.argv[2], encoding="utf-8") as file:
        lines = file.read().split("\n")[:-1]
    records = [json.loads(line) for line in lines]
    compare("Parquet", parquet.read_table(sys.argv[3]), records, lines)
    compare("Arrow", feather.read_table(sys.argv[4]), records, lines)
    codec = parquet.ParquetFile(sys.argv[3]).metadata.row_group(0).column(0).compression
    assert codec == "ZSTD", codec
    print(len(records), "alike")


main()
