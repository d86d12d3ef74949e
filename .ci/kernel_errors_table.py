#!/usr/bin/env python3
"""Makes docs/KERNEL-ERRORS.md of what `run tests` of the bundle of .ci/gpu-bundle printed:

    python3 .ci/kernel_errors_table.py OUTPUT [NOTE] > docs/KERNEL-ERRORS.md

NOTE goes below the introduction.
"""

import re
import sys

HEAD = """# Errors of the GPU kernels

The largest error that the conformance battery found, in units of the bound that the kernel derives for its own arithmetic
(`LinearKernel::error_bound`): 1 would be an output that is as wrong as it may be. The bound is the rounding of the output to
fp16 or bf16, plus a small multiple of `2^-24 sum |x w|` for the accumulation in float32; where the former dominates, as in
all of these layers, the worst of many thousand outputs comes close to 1 by the rounding alone. Empty where a kernel does
not do such layers. Epilogues count with the kind of layer that they end.

{gpu}; `.ci/gpu-bundle`, then `run tests`, which prints these numbers and fails above 1;
this page is made of them by `.ci/kernel_errors_table.py`. {note}
"""
PACKED = re.compile(
    r"Packed \{ bits: B(\d), group_size: (None|Some\((\d+)\)), sym: (\w+), groups: (\w+) \}"
)
ORDERS = {"InOrder": "in order", "ActOrder": "act-order", "Arbitrary": "arbitrary"}


def read(lines):
    """Worst errors: layer (a tuple of cells) -> (kernel, type of activations) -> number."""
    gpu, worst = "A GPU", {}
    for line in lines:
        # With --nocapture a result may stand behind the name of its test.
        line = line.strip().rpartition(" ... ")[2]
        if line.startswith("NVIDIA ") and "," in line:
            name, driver = line.split(", ")
            gpu = f"{name}, driver {driver}"
        cells = line.split(" | ")
        if len(cells) != 4:
            continue
        kernel, dtype, weight, units = cells
        if packed := PACKED.fullmatch(weight):
            bits, _, group, sym, order = packed.groups()
            zero = "sym" if sym == "true" else "asym"
            layer = (bits, zero, ORDERS[order], group or "one")
        else:
            layer = ("float", re.fullmatch(r"Dense\((\w+)\)", weight).group(1).lower(), "", "")
        column = worst.setdefault(layer, {})
        column[kernel, dtype] = max(float(units), column.get((kernel, dtype), 0))
    return gpu, worst


def tables(worst, columns):
    """One table of packed layers and one of float layers, each with the kernels that do such layers."""
    for floats in (False, True):
        part = {layer: found for layer, found in worst.items() if (layer[0] == "float") == floats}
        used = [column for column in columns if any(column in found for found in part.values())]
        if not used:
            continue
        cells = ["weight"] if floats else ["bits", "zero", "features", "group"]
        yield "| " + " | ".join([*cells, *(", ".join(column) for column in used)]) + " |"
        yield "|---" * (len(cells) + len(used)) + "|"
        for layer, found in part.items():
            numbers = [f"{found[column]:.3f}" if column in found else "" for column in used]
            if any(numbers):
                yield "| " + " | ".join([*(layer[1:2] if floats else layer), *numbers]) + " |"
        yield ""


def main():
    with open(sys.argv[1], encoding="utf-8", errors="replace") as file:
        gpu, worst = read(file)
    columns = list(dict.fromkeys(column for found in worst.values() for column in found))
    columns.sort(key=lambda column: (column[0], column[1]))
    generic = [column for column in columns if column[1].endswith("generic image")]
    # A row a layer, in the order of the battery: bits, zero, order, group.
    orders = list(ORDERS.values())
    group = lambda layer: int(layer[3]) if layer[3].isdigit() else 1 << 30
    rank = lambda layer: (layer[0], layer[1] != "sym", orders.index(layer[2]) if layer[2] else 0, group(layer))
    worst = dict(sorted(worst.items(), key=lambda item: rank(item[0])))
    print(HEAD.format(gpu=gpu, note=" ".join(sys.argv[2:])).replace(" \n", "\n"))
    print("\n".join(tables(worst, [column for column in columns if column not in generic])).rstrip())
    if generic:
        print("\n## Generic images\n")
        print("The same GPU, made to run the images for compute capability 8.0, as all older ones do.\n")
        renamed = {
            layer: {(k, d.removesuffix(", generic image")): units for (k, d), units in found.items() if (k, d) in generic}
            for layer, found in worst.items()
        }
        print("\n".join(tables(renamed, [(k, d.removesuffix(", generic image")) for k, d in generic])).rstrip())


if __name__ == "__main__":
    main()
