"""Runs trials for `job.engines.ways.child`: PARENT MODULE DEVICE NAME…; prints JSON lines."""

import importlib
import json
import sys

import torch

from job import signals


def main() -> None:
    parent, module, device, *names = sys.argv[1:]
    signals.die_with_parent(int(parent))
    trials = importlib.import_module(module)
    where = torch.device(device)
    if where.type != "cpu":
        torch.cuda.set_device(where)
    _use(where)  # before the first message, which says that the device can be used
    print(json.dumps({"started": device}), flush=True)
    for name in names:
        outcomes = trials.run([name], where)
        for outcome in outcomes:
            print(json.dumps({"outcome": outcome.to_json()}), flush=True)
        print(json.dumps({"done": name}), flush=True)
        if not all(outcome.taken for outcome in outcomes):
            _use(where)  # raises after a fault: the others are tried in a new process


def _use(device: torch.device) -> None:
    torch.ones(1, device=device).sum().item()


if __name__ == "__main__":
    main()
