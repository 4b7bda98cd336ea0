"""``models``: the families that can be partitioned."""

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepspeed_sdp.cli.options import Commands


def add_commands(commands: "Commands") -> None:
    """Add what this file holds."""
    models = commands.add_parser("models", help="list the model families that can be partitioned")
    models.add_argument("--json", action="store_true", help="JSON instead of a table")
    models.set_defaults(run=_models)


def _models(args: argparse.Namespace) -> None:
    from deepspeed_sdp.adapters import ADAPTERS

    rows = [
        {
            "adapter": adapter.name,
            "families": list(adapter.families),
            "attention": about["attention"],
            "mlp": about["mlp"],
        }
        for adapter in ADAPTERS
        for about in (adapter.units,)
    ]
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"{row['adapter']:<10}{', '.join(row['families'])}")
        print(f"{'':<10}attention: {row['attention']}; mlp: {row['mlp']}; blocks: layers or branches")
    print("A family is known by the names of its modules, not by its class; docs/adapters.md shows how to add one.")
