"""Serves a request for races without a device: one way ends its process."""

from __future__ import annotations

import json
import os
import sys

WAYS = ("dequantize", "fused", "bitsandbytes")


def main() -> None:
    """Print what a worker prints."""
    request = json.loads(sys.argv[1])
    for shape in request["linear"]:
        if shape[0] == 1:
            sys.exit("the device is busy")
        name = f"product {shape}"
        if name in request["done"]:
            continue
        ways = [way for way in WAYS if f"product {way}" not in request["banned"]]
        for way in ways:
            print(json.dumps({"starts": ["product", way, name]}), flush=True)
            if way == "fused" and shape[0] == 64:
                print("illegal memory access", file=sys.stderr, flush=True)
                os.abort()
        times = {way: 10.0 - i for i, way in enumerate(ways)}
        race = {"question": "product", "dtype": "bfloat16", "shape": shape, "tokens": 8}
        race |= {"winner": ways[-1], "microseconds": times, "done": name}
        print(json.dumps(race), flush=True)


if __name__ == "__main__":
    main()
