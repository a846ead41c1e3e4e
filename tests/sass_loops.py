"""Find the main loops of an attention kernel in a disassembly."""

import re


def instructions(sass):
    """Yield (label or opcode, operands) in program order."""
    pattern = r"^\s*(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);"
    for label, opcode, operands in re.findall(pattern, sass, re.MULTILINE):
        yield (label, "") if label else (opcode, operands)


def main_loops(sass):
    """Return the innermost loops with products and exponentials, as lists of `instructions`."""
    code = list(instructions(sass))
    at = {name: i for i, (name, _) in enumerate(code) if name.startswith(".L_x")}
    loops = []
    for i, (opcode, operands) in enumerate(code):
        target = re.search(r"\.L_x_\d+", operands) if opcode == "BRA" else None
        if target and at.get(target[0], i) < i:
            names = {name.split(".")[0] for name, _ in code[at[target[0]] : i]}
            # The retry of a wait stands behind the kernel's end and jumps back: no loop.
            if {"HGMMA", "MUFU"} <= names and "EXIT" not in names:
                loops.append((at[target[0]], i))
    return [code[a:b] for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
