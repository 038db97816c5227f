"""List the files in the cache, or delete them."""

from __future__ import annotations

import argparse
import time
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clear", action="store_true", help="delete all files in the cache")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from imagevec import cache

    folder, entries, models = cache.root(), cache.entries(), cache.models()
    if options.clear:
        cache.clear()
    return {
        "folder": str(folder),
        "limit_bytes": cache.limit_bytes(),
        "bytes": sum(entry.bytes for entry in entries),
        "cleared": options.clear,
        "entries": [
            {
                "name": str(entry.path.relative_to(folder)),
                "model": models.get(entry.path.name),
                "bytes": entry.bytes,
                "used": time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used)),
            }
            for entry in reversed(entries)
        ],
    }


def show(result: dict[str, Any]) -> str:
    megabytes, limit = result["bytes"] / 1e6, result["limit_bytes"] / 1e9
    if result["cleared"]:
        return f"{megabytes:,.1f} MB deleted from {result['folder']}"
    lines = [f"{result['folder']}: {megabytes:,.1f} MB, limit {limit:g} GB"]
    lines += [
        f"{entry['used']}  {entry['bytes'] / 1e6:>9,.1f} MB  {entry['name'][:30]:<30}  "
        f"{entry['model'] or ''}".rstrip()
        for entry in result["entries"]
    ]
    return "\n".join(lines)
