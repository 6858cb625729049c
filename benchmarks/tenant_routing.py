"""How many of 1,000 mixed requests are answered through another tenant's adapter? It must be none.

    python benchmarks/tenant_routing.py --registry runs/demo/registry --alias production --requests 1000

A release is served for a moment on a free port of this machine. Clients send requests of every tenant (and of none) at
once, greedy and sampled with seeds, so that the engine decodes them in mixed batches. Each answer is then compared with
what the tenant's adapter says alone: a fresh engine that holds this one adapter, one row at a time. The audit file must
name, for every request, the content hash of the tenant's adapter. The exit code is 1 where one request fails either test.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from temper.core.storage import write_json
from temper.registry import Registry
from temper.serve.routing import route


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", type=Path, default=Path("runs/registry"))
    parser.add_argument("--alias", default="production")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--unique", type=int, default=200)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = route(
            Registry(told.registry, create=False), told.alias, total=told.requests, unique=told.unique, clients=told.clients,
            max_tokens=told.max_tokens, scratch=Path(scratch),
        )  # fmt: skip
    print(json.dumps(found, indent=1))
    if told.out:
        write_json(told.out, found)
    return int(found["audit_names_another_adapter"] + found["answers_equal_to_another_tenants"] + found["answers_not_as_alone"] > 0)


if __name__ == "__main__":
    sys.exit(main())
